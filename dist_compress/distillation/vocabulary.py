"""The vocabulary split over the ranks of data parallel: `distillation.teacher.mode=vocab`.

Each rank has its own tokens, and owns a run of rows of the student's and of the teacher's output layer. The hidden
states of all tokens that count come together on every rank; each makes the logits of its rows for all of them, a chunk
at a time, and the gradient of the hidden states goes back to where they came from. The gradient of the student's output
layer is zero outside of a rank's rows: data parallel's sum over the ranks puts it together. What moves is
[all tokens, H of both models] a round, and no rank needs the teacher's whole output layer.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.distillation.head import Head, head_loss
from dist_compress.distillation.losses import CHUNK_ELEMENTS, Divergence
from dist_compress.errors import UserError

KEY = "distillation.teacher.mode=vocab"


def check(config: Config, fuses: bool) -> None:
    """Raise UserError for what cannot be had with a split vocabulary. `fuses`: the method takes logits that are never
    whole. Local."""
    if not fuses:
        raise UserError(
            f"{KEY} splits logits, and distillation.method={config.distillation.method!r} compares none, or whole ones."
            " Set distillation.method=logits (hidden states may stand in distillation.config_list beside it), or "
            "distillation.teacher.mode=online."
        )
    if not config.task.fused_head:
        raise UserError(f"{KEY}: logits must never be whole. Set task.fused_head=true, with task=causal_lm.")
    if config.train.exact:
        raise UserError(
            f"{KEY}: train.exact=true promises equal bits at any number of ranks, but sums over the vocabulary have as "
            "many parts as there are ranks. Set train.exact=false, or distillation.teacher.mode=online, whose ranks "
            "have the whole vocabulary."
        )


def rows_of(num_classes: int, rank: int) -> slice:
    """Which rows of an output layer a rank owns; they differ by one in number at most, and may be none. Local."""
    size = comm.world_size()
    return slice(num_classes * rank // size, num_classes * (rank + 1) // size)


def split_loss(
    hidden: torch.Tensor,
    head: Head,
    teacher_hidden: torch.Tensor,
    teacher_rows: Head,
    how: Divergence,
    valid: torch.Tensor,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """The divergence, summed over the valid tokens of this rank, a scalar. Collective, backward too.

    `hidden`: [T, H], `teacher_hidden`: [T, H of the teacher], `valid`: bool [T], of this rank's tokens: any number of
    them, and none is valid on a rank without a micro-batch. `head`: the student's whole output layer, `teacher_rows`:
    this rank's rows of the teacher's (`rows_of`). Ranks with tokens scale their losses alike before `backward`; on
    those without, any scale will do. Collectives: counts of tokens and hidden states are gathered, two sums a chunk
    (three for jensen_shannon), the sum of the gradient of the hidden states; one number in the backward pass.
    """
    num_classes, own = len(head.weight), rows_of(len(head.weight), comm.rank())
    rows = Head(head.weight[own], None if head.bias is None else head.bias[own])
    count = torch.tensor([int(valid.sum())], device=hidden.device)
    counts: list[int] = comm.all_gather(count)[:, 0].tolist()
    together, theirs = _Together.apply(hidden[valid], teacher_hidden[valid], counts)  # type: ignore[misc]
    widest = -(-num_classes // comm.world_size())  # so that chunks are as many on every rank
    size = chunk_tokens or max(CHUNK_ELEMENTS // widest, 1)
    total, parts = head_loss(together, rows, theirs, teacher_rows, how, chunk_tokens=size, sharded=True)
    mine = parts[_span(counts)].sum(0)[0]
    return _Mine.apply(total, mine, counts)  # type: ignore[return-value]


def _span(counts: list[int]) -> slice:
    """Where this rank's tokens lie among those of all."""
    first = sum(counts[: comm.rank()])
    return slice(first, first + counts[comm.rank()])


class _Together(torch.autograd.Function):
    """Hidden states of this rank's tokens -> those of all tokens, in the order of the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, theirs: torch.Tensor, counts: list[int]) -> Any:
        ctx.span = _span(counts)
        flat = torch.cat([x.contiguous().view(torch.uint8) for x in (hidden, theirs)], 1)  # of two dtypes, perhaps
        padded = flat.new_zeros(max(counts), flat.shape[1])
        padded[: len(flat)] = flat
        gathered = comm.all_gather(padded)
        flat = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
        own, other = flat.split([x.shape[1] * x.element_size() for x in (hidden, theirs)], 1)
        return own.contiguous().view(hidden.dtype), other.contiguous().view(theirs.dtype)

    @staticmethod
    def backward(ctx: Any, *ups: Any) -> Any:
        """`head_loss` has summed over the ranks already."""
        return ups[0][ctx.span], None, None


class _Mine(torch.autograd.Function):
    """This rank's part of a loss; what goes back is of the loss of all, for a rank's rows learn from all tokens. So it
    is scaled as on the ranks that have some: one whose micro-batch is a dummy, weighted zero, still owns rows."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, mine: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.first = next((rank for rank, count in enumerate(counts) if count), 0)
        return mine.clone()

    @staticmethod
    def backward(ctx: Any, up: torch.Tensor) -> Any:
        return comm.all_gather(up)[ctx.first], None, None
