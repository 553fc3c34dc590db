"""Output layer and loss in one: values and gradients of the dense formula, and no [tokens, vocabulary] anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_compress import comm
from dist_compress.distillation.head import Head, head_loss, label_loss
from dist_compress.distillation.losses import KINDS, Divergence, divergence
from dist_compress.errors import UserError

T, V, H = 40, 120, 12


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {"hidden": (T, H), "weight": (V, H), "bias": (V,), "teacher": (T, 2 * H), "theirs": (V, 2 * H)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


LABELS = torch.arange(T) * 7 % V
VALID = torch.arange(T) % 4 != 2
TRAINED = ("hidden", "weight", "bias")


def dense(how: Divergence, label_weight: float, valid: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    t = tensors()
    x = {name: t[name].requires_grad_() for name in TRAINED}
    logits = F.linear(x["hidden"], x["weight"], x["bias"])
    loss = 0.7 * (divergence(logits, t["teacher"] @ t["theirs"].T, how) * valid).sum()
    loss = loss + label_weight * (F.cross_entropy(logits, LABELS, reduction="none") * valid).sum()
    return loss.detach(), list(torch.autograd.grad(loss * 3, list(x.values())))


def fused(how: Divergence, chunk: int | None, labels: bool, valid: Any, dtype: torch.dtype = torch.float64) -> Any:
    t = tensors(dtype)
    x = {name: t[name].requires_grad_() for name in TRAINED}
    loss, parts = head_loss(
        x["hidden"], Head(x["weight"], x["bias"]), t["teacher"], Head(t["theirs"]), how, weight=0.7,
        labels=LABELS if labels else None, label_weight=0.3, valid=valid, chunk_tokens=chunk,
    )  # fmt: skip
    return loss.detach(), parts.sum(0), list(torch.autograd.grad(loss * 3, list(x.values())))


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 32, T, None])
def test_values_and_gradients(kind, chunk):
    for temperature in (1.0, 2.0, 4.0):
        for labels, valid in ((True, VALID), (False, None)):
            how = Divergence(kind, temperature)
            right, slopes = dense(how, 0.3 if labels else 0.0, torch.ones(T) if valid is None else valid)
            for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
                loss, parts, grads = fused(how, chunk, labels, valid, dtype)
                assert error(loss, right) <= bound
                assert error(0.7 * parts[0] + 0.3 * parts[1], right) <= bound and not parts.requires_grad
                for grad, slope in zip(grads, slopes, strict=True):
                    assert grad.dtype == dtype and error(grad, slope) <= bound


def test_no_valid_token():
    loss, parts, grads = fused(Divergence(), 8, True, torch.zeros(T, dtype=torch.bool))
    assert float(loss) == 0 and parts.tolist() == [0, 0] and all(bool((g == 0).all()) for g in grads)


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_logits_are_never_whole():
    with Largest() as fused_largest:
        fused(Divergence(), 4, True, None)
    with Largest() as dense_largest:
        dense(Divergence(), 0.3, torch.ones(T))
    assert dense_largest.numel == T * V  # the measure sees them
    assert fused_largest.numel == V * 2 * H < T * V  # the teacher's output layer itself


def column_parallel(kind: str) -> Any:
    cuts = {1: [V], 2: [50, 70], 3: [30, 0, 90], 4: [1, 29, 40, 50]}[comm.world_size()]
    t = tensors()
    own = [t[name].split(cuts)[comm.rank()].clone() for name in ("weight", "bias", "theirs")]
    hidden, weight, bias = (x.requires_grad_() for x in (t["hidden"], *own[:2]))
    comm.calls.clear()
    loss, _ = head_loss(
        hidden, Head(weight, bias), t["teacher"], Head(own[2]), Divergence(kind, 2.0), weight=0.7, valid=VALID,
        chunk_tokens=10, sharded=True,
    )  # fmt: skip
    grads = torch.autograd.grad(loss * 3, [hidden, weight, bias])
    return loss.detach(), grads, dict(comm.calls)


@pytest.mark.parametrize("kind", KINDS)
def test_column_parallel(ranks, kind):
    right, (hidden, weight, bias) = dense(Divergence(kind, 2.0), 0.0, VALID)
    for n in (1, 2, 3, 4):
        results = ranks(n, column_parallel, kind)
        for loss, grads, calls in results:
            assert error(loss, right) <= 1e-12 and error(grads[0], hidden) <= 1e-12
            assert calls == {"all_reduce": 3 * (3 if kind == "jensen_shannon" else 2) + 1}
        assert error(torch.cat([grads[1] for _, grads, _ in results]), weight) <= 1e-12
        assert error(torch.cat([grads[2] for _, grads, _ in results]), bias) <= 1e-12


def test_what_is_refused():
    t = tensors()
    head, other = Head(t["weight"]), Head(t["theirs"][1:])
    with pytest.raises(UserError, match=r"120 \(student\) and 119 \(teacher\) rows"):
        head_loss(t["hidden"], head, t["teacher"], other, Divergence())
    with pytest.raises(UserError, match="takes no labels"):
        head_loss(t["hidden"], head, t["teacher"], Head(t["theirs"]), Divergence(), labels=LABELS, sharded=True)


@pytest.mark.parametrize("chunk", [1, 32, None])
def test_labels_alone(chunk):
    t = tensors()
    x = [t[name].requires_grad_() for name in TRAINED]
    logits = F.linear(*x)
    right = (F.cross_entropy(logits, LABELS, reduction="none") * VALID).sum()
    slopes = torch.autograd.grad(right * 3, x)
    loss, correct = label_loss(x[0], Head(*x[1:]), LABELS, VALID, chunk)
    assert int(correct) == int(((logits.argmax(1) == LABELS) & VALID).sum()) > 0 and not correct.requires_grad
    assert error(loss.detach(), right.detach()) <= 1e-12
    for grad, slope in zip(torch.autograd.grad(loss * 3, x), slopes, strict=True):
        assert error(grad, slope) <= 1e-12
    with torch.no_grad(), Largest() as largest:
        assert error(label_loss(x[0], Head(*x[1:]), LABELS, VALID, 4)[0], right) <= 1e-12
    assert largest.numel <= V * H  # no gradients are made where none are wanted


def test_hidden_states_of_bfloat16_meet_a_layer_of_float32():
    t = tensors(torch.float32)
    hidden, weight = t["hidden"].bfloat16().requires_grad_(), t["weight"].requires_grad_()
    teacher = (t["teacher"].bfloat16(), Head(t["theirs"]))
    for loss in (
        label_loss(hidden, Head(weight), LABELS, VALID)[0],
        head_loss(hidden, Head(weight), *teacher, Divergence(), labels=LABELS, label_weight=1.0)[0],
    ):
        grads = torch.autograd.grad(loss, [hidden, weight])
        assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32] and bool(loss.isfinite())
