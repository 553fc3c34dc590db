"""How far a student's logits are from a teacher's, token by token: pure functions, whole or sharded by vocabulary.

With a = student / tau, b = teacher / tau and p, q the softmax of b and of a (Hinton, Vinyals and Dean 2015,
arXiv:1503.02531), times tau^2 where asked for, so that gradients keep their size at any temperature:

    forward          KL(p|q) = sum p (b - a) - lse(b) + lse(a)         d/dstudent = (q - p) / tau
    reverse          KL(q|p) = sum q (a - b) - lse(a) + lse(b)         q ((log q - log p) - KL(q|p)) / tau
    jensen_shannon   m = beta p + (1 - beta) q
                     beta KL(p|m) + (1 - beta) KL(q|m)                 (1 - beta) q (log(q / m) - KL(q|m)) / tau

Each rank may hold the columns of one part of the vocabulary (`sharded=True`): two flat collectives in the forward
pass, a maximum of [2, T] and a sum of [3, T] (three for jensen_shannon: its mixture needs probabilities first), none
the backward pass. Sums are in float32, or float64 for float64 logits; what is kept for the backward pass is the
gradient alone, in the student's dtype. A teacher gets no gradient. Columns of padding hold -inf in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress import comm
from dist_compress.errors import UserError

CHUNK_ELEMENTS = 1 << 24  # of logits that are worked on at once: 64 MB of float32
KINDS = ("forward", "reverse", "jensen_shannon")
Reduce = Callable[[torch.Tensor, str], torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """Which divergence, of distributions softened how much."""

    kind: str = "forward"
    temperature: float = 1.0
    tau_squared: bool = True  # multiply by temperature^2
    beta: float = 0.5  # of jensen_shannon: the teacher's share of the mixture

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"divergence kind {self.kind!r}: choose {', '.join(KINDS)}.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: must be above 0 and finite.")
        if not 0 < self.beta < 1:
            raise UserError(f"beta {self.beta}: must be above 0 and below 1.")

    @property
    def scale(self) -> float:
        return self.temperature**2 if self.tau_squared else 1.0


@dataclass(frozen=True)
class TopK:
    """What is known of a teacher's distribution at one temperature: some of its entries and the mass of the rest.
    exp(log_probs).sum(1) + exp(tail) = 1."""

    ids: torch.Tensor  # int64 [T, k], distinct in a row, but for those without mass
    log_probs: torch.Tensor  # float [T, k]; -inf: no mass
    tail: torch.Tensor  # float [T]: log of the mass outside; -inf: none
    entropy: torch.Tensor  # float [T]: that of the distribution less that of a drawn rest; 0: the rest is one event

    def to(self, device: torch.device) -> TopK:
        return TopK(*(x.to(device) for x in self._fields()))

    def split(self, size: int) -> list[TopK]:
        """By tokens."""
        return [TopK(*part) for part in zip(*(x.split(size) for x in self._fields()), strict=True)]

    def _fields(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.log_probs, self.tail, self.entropy


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    how: Divergence,
    valid: torch.Tensor | None = None,
    sharded: bool = False,
) -> torch.Tensor:
    """float [T], for each token its divergence; 0 where `valid`, bool [T], is False, whatever the logits are there.

    `student`, `teacher`: [T, V], or the [T, V_rank] columns of this rank when `sharded`, for the same tokens on every
    rank, any number of columns; then collective, and the result has the same bits on every rank. Else local.
    """
    if student.dim() != 2 or student.shape != teacher.shape:
        raise UserError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)}: both must be "
            "[tokens, classes], with the same classes (or the same columns of them on this rank)."
        )
    return _Divergence.apply(student, teacher.detach(), how, valid, reduction(sharded))  # type: ignore[return-value]


def topk_divergence(
    student: torch.Tensor,
    known: TopK,
    how: Divergence,
    valid: torch.Tensor | None = None,
    sharded: bool = False,
    first: int = 0,
) -> torch.Tensor:
    """float [T]: forward KL over the k + 1 events "entry i" and "none of them", which is all a stored top-k tells.

    sum_K p (log p - log q) + r (log r - log s), where r and s are the masses outside, less `known.entropy`. Where the
    rest is drawn (r = 0), loss and gradient are in expectation those of the whole distribution. `known` holds at the
    temperature of `how`. `student` as in `divergence`; when `sharded`, `first` is the number of this rank's first
    column, and `known` is the same on every rank. s is a sum of its own, so that nothing cancels.
    """
    if how.kind != "forward":
        raise UserError(f"divergence kind {how.kind!r}: a stored top-k serves forward alone.")
    return _TopK.apply(student, known, how, valid, reduction(sharded), first)  # type: ignore[return-value]


def mixed(label_loss: torch.Tensor, divergence: torch.Tensor, weight: float) -> torch.Tensor:
    """(1 - weight) label_loss + weight divergence: the cross-entropy to labels mixed with the teacher's
    probabilities, but for a constant."""
    return (1 - weight) * label_loss + weight * divergence


def reduction(sharded: bool) -> Reduce:
    """How rows of the vocabulary's parts are put together: over the ranks, or not at all."""
    return comm.all_reduce if sharded else lambda t, op: t


class _Divergence(torch.autograd.Function):
    """The gradient is made with the loss, while the logits are at hand."""

    @staticmethod
    def forward(ctx: Any, student: Any, teacher: Any, how: Divergence, valid: Any, reduce: Reduce) -> torch.Tensor:
        loss, grad = loss_and_grad(student, teacher, how, reduce)
        return _keep(ctx, student, loss, grad, valid)

    @staticmethod
    def backward(ctx: Any, *ups: Any) -> Any:
        return _scaled(ctx, ups[0]), None, None, None, None


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Any, known: TopK, how: Divergence, valid: Any, reduce: Reduce, first: int
    ) -> torch.Tensor:
        loss, grad = _topk(student, known, how, reduce, first)
        return _keep(ctx, student, loss, grad, valid)

    @staticmethod
    def backward(ctx: Any, *ups: Any) -> Any:
        return _scaled(ctx, ups[0]), None, None, None, None, None


def _keep(ctx: Any, student: torch.Tensor, loss: torch.Tensor, grad: torch.Tensor, valid: Any) -> torch.Tensor:
    if valid is not None:
        loss, grad = loss.masked_fill(~valid, 0), grad.masked_fill_(~valid[:, None], 0)
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(grad.to(student.dtype))
    return loss


def _scaled(ctx: Any, up: torch.Tensor) -> torch.Tensor:
    (grad,) = ctx.saved_tensors
    return (grad * up[:, None]).to(grad.dtype)


def loss_and_grad(
    student: torch.Tensor, teacher: torch.Tensor, how: Divergence, reduce: Reduce
) -> tuple[torch.Tensor, torch.Tensor]:
    """([T], [T, V]) of `divergence`, outside of autograd, in the dtype of the sums. Collective if `reduce` is."""
    a, b = _softened(student, how), _softened(teacher, how)
    top = reduce(torch.stack([_row_max(a), _row_max(b)]), "max")
    a.sub_(top[0, :, None])
    b.sub_(top[1, :, None])
    kernel = {"forward": _forward, "reverse": _reverse, "jensen_shannon": _jensen_shannon}[how.kind]
    loss, grad = kernel(a, b, how, reduce)
    return loss * how.scale, grad.mul_(how.scale / how.temperature)


# a and b below: [T, V] logits over the temperature, less the row's maximum; overwritten.


def _forward(a: torch.Tensor, b: torch.Tensor, how: Divergence, reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor]:
    gap = b - a
    a.exp_()
    b.exp_()
    gap.masked_fill_(b == 0, 0)  # what the teacher excludes adds nothing, also where -inf meets -inf
    s, t, between = reduce(torch.stack([a.sum(1), b.sum(1), gap.mul_(b).sum(1)]), "sum")
    return between / t - t.log() + s.log(), a.div_(s[:, None]).sub_(b.div_(t[:, None]))


def _reverse(a: torch.Tensor, b: torch.Tensor, how: Divergence, reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor]:
    gap = a - b
    a.exp_()
    b.exp_()
    gap.masked_fill_(a == 0, 0)
    s, t, between = reduce(torch.stack([a.sum(1), b.sum(1), (gap * a).sum(1)]), "sum")
    loss = between / s - s.log() + t.log()
    gap.add_((t.log() - s.log() - loss)[:, None])
    return loss, gap.mul_(a.div_(s[:, None]))


def _jensen_shannon(
    a: torch.Tensor, b: torch.Tensor, how: Divergence, reduce: Reduce
) -> tuple[torch.Tensor, torch.Tensor]:
    s, t = reduce(torch.stack([a.exp().sum(1), b.exp().sum(1)]), "sum")
    a.sub_(s.log()[:, None])
    b.sub_(t.log()[:, None])
    mixture = torch.logaddexp(b + math.log(how.beta), a + math.log(1 - how.beta))
    gap_a, gap_b = (x.sub(mixture).masked_fill_(x.isneginf(), 0) for x in (a, b))
    a.exp_()
    from_b, from_a = reduce(torch.stack([gap_b.mul_(b.exp_()).sum(1), (gap_a * a).sum(1)]), "sum")
    grad = gap_a.sub_(from_a[:, None]).mul_(a).mul_(1 - how.beta)
    return how.beta * from_b + (1 - how.beta) * from_a, grad


def _topk(
    student: torch.Tensor, known: TopK, how: Divergence, reduce: Reduce, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    a = _softened(student, how)
    a.sub_(reduce(_row_max(a), "max")[:, None])
    ids, here = known.ids - first, (known.ids >= first) & (known.ids < first + a.shape[1])
    rows = torch.arange(len(a), device=a.device)[:, None].expand_as(ids)[here]
    log_p, log_r = known.log_probs.to(a.dtype), known.tail.to(a.dtype)
    p, r = log_p.exp(), log_r.exp()
    picked = a.gather(1, ids.clamp(0, a.shape[1] - 1)) if a.shape[1] else torch.zeros_like(p)
    peak = log_p.amax(1)  # like the shift of a, so that what is summed is small
    gap = ((log_p - peak[:, None] - picked) * p).masked_fill(~here | (p == 0), 0).sum(1)
    own = torch.zeros_like(a)  # the teacher's probabilities of the entries that lie here
    own.index_put_((rows, ids[here]), p[here], accumulate=True)  # an id without mass may be there twice
    outside = torch.ones_like(a, dtype=torch.bool)
    outside[rows, ids[here]] = False
    a.exp_()
    total, rest, gap = reduce(torch.stack([a.sum(1), (a * outside).sum(1), gap]), "sum")
    tail = (r * (log_r - rest.log() + total.log())).masked_fill(r == 0, 0)
    loss = gap + p.sum(1) * (peak + total.log()) + tail - known.entropy.to(a.dtype)
    share = torch.where(r > 0, r / rest, 0)
    grad = a * ((p.sum(1) + r) / total)[:, None] - own
    grad.sub_(a.mul_(outside).mul_(share[:, None]))
    return loss * how.scale, grad.mul_(how.scale / how.temperature)


def _softened(logits: torch.Tensor, how: Divergence) -> torch.Tensor:
    """A copy over the temperature, in the dtype of the sums."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.detach().to(dtype, copy=True).div_(how.temperature)


def _row_max(x: torch.Tensor) -> torch.Tensor:
    """[T]; -inf of no columns."""
    return x.amax(1) if x.shape[1] else x.new_full((len(x),), -torch.inf)
