"""Output layer and distillation loss in one, a chunk of tokens at a time: no [tokens, vocabulary] is ever whole.

The logits of a chunk are made, used for loss and gradient, and overwritten by the next chunk's. The gradients of the
hidden states and of the output layer are summed on the way, in the forward pass (as Liger-Kernel does it for
cross-entropy, arXiv:2410.10989), so the backward pass only scales them. Data parallel: each rank has its own tokens and
whole output layers, nothing is sent. `sharded`: each rank has a part of the rows of both output layers and the same
tokens (column parallel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_compress import comm
from dist_compress.distillation.losses import CHUNK_ELEMENTS, Divergence, loss_and_grad, reduction
from dist_compress.errors import UserError


@dataclass(frozen=True)
class Head:
    """An output layer: logits = hidden @ weight.T + bias."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None = None  # [V]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """In the dtype of `hidden`."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)


def head_loss(
    hidden: torch.Tensor,
    head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    how: Divergence,
    *,
    weight: float = 1.0,
    labels: torch.Tensor | None = None,
    label_weight: float = 0.0,
    valid: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    sharded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight * divergence + label_weight * cross-entropy, summed over the valid tokens; float [T, 2], both alone for
    each token, 0 where it does not count, without gradient).

    `hidden`: [T, H], `teacher_hidden`: [T, H of the teacher]; the vocabularies are equal. `labels`: int64 [T]. `valid`:
    bool [T], None: all. `chunk_tokens`: None: as many as CHUNK_ELEMENTS hold. Local; collective when `sharded`, which
    takes no labels: two collectives a chunk (three for jensen_shannon) and one sum of the hidden states' gradient.
    """
    if head.weight.shape[0] != teacher_head.weight.shape[0]:
        raise UserError(
            f"output layers of {head.weight.shape[0]} (student) and {teacher_head.weight.shape[0]} (teacher) rows: the "
            "vocabularies must be equal. Cut padding rows off first."
        )
    if sharded and labels is not None:
        raise UserError("head_loss(sharded=True) takes no labels: their loss belongs to the tensor-parallel model.")
    size = chunk_tokens or max(CHUNK_ELEMENTS // max(head.weight.shape[0], 1), 1)
    return _Head.apply(  # type: ignore[return-value]
        hidden, head.weight, head.bias, teacher_hidden.detach(), teacher_head, how, (weight, label_weight), labels,
        valid, size, sharded,
    )  # fmt: skip


def label_loss(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, valid: torch.Tensor, chunk_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy summed over the valid tokens, how many of them are the likeliest), scalars; the second without
    gradient. `hidden`: [T, H], `labels`: int64 [T], `valid`: bool [T]. Local."""
    size = chunk_tokens or max(CHUNK_ELEMENTS // max(head.weight.shape[0], 1), 1)
    return _Labels.apply(hidden, head.weight, head.bias, labels, valid, size, torch.is_grad_enabled())  # type: ignore


class _Labels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, labels: Any, valid: Any, size: int, wanted: bool) -> Any:
        head = Head(weight, bias)
        sums = torch.zeros(2, dtype=_sum_dtype(hidden), device=hidden.device)
        grad_hidden, grad_weight, grad_bias = _no_gradients(hidden, weight, bias) if wanted else (None,) * 3
        for chunk in valid.nonzero()[:, 0].split(size):
            logits = head.logits(hidden[chunk])
            sums[1] += (logits.argmax(1) == labels[chunk]).sum()
            grad = torch.zeros_like(logits, dtype=sums.dtype)
            sums[0] += _add_cross_entropy(logits, labels[chunk], 1.0, grad).sum()
            if wanted:
                _add_gradients(hidden, weight, chunk, grad, grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        loss, correct = sums.unbind()
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *ups: Any) -> Any:
        return *_scaled(ctx, ups[0]), None, None, None, None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, teacher_hidden: Any, teacher_head: Head, how: Divergence,
        weights: tuple[float, float], labels: Any, valid: Any, size: int, sharded: bool,
    ) -> Any:  # fmt: skip
        head, reduce = Head(weight, bias), reduction(sharded)
        parts = torch.zeros(len(hidden), 2, dtype=_sum_dtype(hidden), device=hidden.device)
        grad_hidden, grad_weight, grad_bias = _no_gradients(hidden, weight, bias)
        tokens = torch.arange(len(hidden), device=hidden.device) if valid is None else valid.nonzero()[:, 0]
        for chunk in tokens.split(size):
            logits = head.logits(hidden[chunk])
            loss, grad = loss_and_grad(logits, teacher_head.logits(teacher_hidden[chunk]), how, reduce)
            parts[chunk, 0] = loss
            grad.mul_(weights[0])
            if labels is not None:
                parts[chunk, 1] = _add_cross_entropy(logits, labels[chunk], weights[1], grad)
            _add_gradients(hidden, weight, chunk, grad, grad_hidden, grad_weight, grad_bias)
        if sharded:
            comm.all_reduce(grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(parts)
        return parts.sum(0) @ parts.new_tensor(weights), parts

    @staticmethod
    def backward(ctx: Any, *ups: Any) -> Any:
        return *_scaled(ctx, ups[0]), *[None] * 8


def _sum_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _no_gradients(hidden: torch.Tensor, weight: torch.Tensor, bias: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Zeros for the sums over the chunks."""
    dtype = _sum_dtype(hidden)
    return (
        torch.zeros_like(hidden), torch.zeros_like(weight, dtype=dtype),
        None if bias is None else torch.zeros_like(bias, dtype=dtype),
    )  # fmt: skip


def _add_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, chunk: torch.Tensor, grad: torch.Tensor, grad_hidden: Any,
    grad_weight: Any, grad_bias: Any,
) -> None:  # fmt: skip
    """What the gradient of the logits of a chunk, [t, V], is for hidden states and output layer."""
    grad = grad.to(hidden.dtype)
    grad_hidden[chunk] = grad @ weight.to(grad.dtype)
    _add_product(grad_weight, grad, hidden[chunk])
    if grad_bias is not None:
        grad_bias += grad.sum(0)


def _scaled(ctx: Any, up: torch.Tensor) -> Any:
    hidden, weight, bias = ctx.saved_tensors
    grads = [hidden, weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)]
    return (None if grad is None else grad * up.to(grad.dtype) for grad in grads)


def _add_product(total: torch.Tensor, grad: torch.Tensor, inputs: torch.Tensor) -> None:
    """total += grad.T @ inputs, in the dtype of `total`."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, inputs)
    else:
        total += grad.T @ inputs


def _add_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weight: float, grad: torch.Tensor) -> torch.Tensor:
    """Cross-entropies [t]; weight times their gradient is added to `grad`. Overwrites float32 logits."""
    values = logits.to(grad.dtype)
    log_sum = values.logsumexp(1)
    picked = values.gather(1, labels[:, None])[:, 0]
    grad.add_(values.sub_(log_sum[:, None]).exp_(), alpha=weight)
    grad[torch.arange(len(labels), device=labels.device), labels] -= weight
    return log_sum - picked
