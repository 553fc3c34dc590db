"""Each loss and each gradient against the dense float64 formula by autograd, whole and sharded over 1 to 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dist_compress import comm
from dist_compress.distillation.losses import KINDS, Divergence, TopK, divergence, mixed, topk_divergence
from dist_compress.errors import UserError

T, V = 37, 211
TEMPERATURES = (1.0, 2.0, 4.0)
CUTS = {1: [V], 2: [60, 151], 3: [100, 0, 111], 4: [1, 90, 0, 120]}  # uneven, empty
BOUND = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}


def reference(student: torch.Tensor, teacher: torch.Tensor, how: Divergence) -> torch.Tensor:
    """[T] by the definition, in float64, differentiable."""
    a = (student.double() / how.temperature).log_softmax(1)
    b = (teacher.double() / how.temperature).log_softmax(1)

    def kl(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(x.exp() > 0, x.exp() * (x - y), 0.0).sum(1)

    if how.kind == "jensen_shannon":
        m = (how.beta * b.exp() + (1 - how.beta) * a.exp()).log()
        loss = how.beta * kl(b, m) + (1 - how.beta) * kl(a, m)
    else:
        loss = kl(b, a) if how.kind == "forward" else kl(a, b)
    return loss * (how.temperature**2 if how.tau_squared else 1.0)


def logits(dtype: torch.dtype, padding: int = 0, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher of one origin, as far apart as models are; the last columns may be padding."""
    g = torch.Generator().manual_seed(5)
    common = torch.randn(tokens, V, generator=g, dtype=torch.float64)
    student, teacher = (2 * common + torch.randn(tokens, V, generator=g, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def padded(x: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.cat([x, x.new_full((len(x), columns), -torch.inf)], 1)


def gradient(loss: torch.Tensor, x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((loss * up).sum(), x)[0]


def upstream(tokens: int = T) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, tokens, dtype=torch.float64)


def error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Relative, by norms. `floor`: of the expected norm, where a loss is a small difference of large numbers."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=floor))


def expected(kind: str, temperature: float, dtype: torch.dtype, **keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = logits(dtype)
    exact = student.double().requires_grad_()
    loss = reference(exact, teacher, Divergence(kind, temperature, **keys))
    return loss.detach(), gradient(loss, exact, upstream())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_whole_logits(kind, dtype):
    for temperature in TEMPERATURES:
        for keys in ({}, {"tau_squared": False}, {"beta": 0.1}):
            student, teacher = logits(dtype)
            x = student.clone().requires_grad_()
            loss = divergence(x, teacher, Divergence(kind, temperature, **keys))
            right, slope = expected(kind, temperature, dtype, **keys)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert error(loss, right) <= min(BOUND[dtype], 5e-6)
            assert error(gradient(loss, x, upstream().to(loss.dtype)), slope) <= BOUND[dtype]
            assert torch.equal(student, x) and not teacher.requires_grad


def test_the_bounds_would_see_a_missing_tau():
    right, slope = expected("forward", 2.0, torch.float64)
    other, other_slope = expected("forward", 2.0, torch.float64, tau_squared=False)
    assert error(other, right) > 0.5 and error(other_slope, slope) > 0.5
    assert torch.allclose(other * 4, right) and torch.allclose(other_slope * 4, slope)


@pytest.mark.parametrize("kind", KINDS)
def test_values_by_hand(kind):
    """Student (1/2, 1/2), teacher (3/4, 1/4)."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    right = {
        "forward": torch.tensor(1.5).log() * 0.75 + torch.tensor(0.5).log() * 0.25,
        "reverse": torch.tensor(2 / 3).log() * 0.5 + torch.tensor(2.0).log() * 0.5,
        "jensen_shannon": torch.tensor(0.033822),
    }[kind]
    assert torch.allclose(divergence(student, teacher, Divergence(kind))[0], right, atol=1e-6)
    assert float(divergence(teacher, teacher, Divergence(kind))[0]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_columns_and_tokens_that_do_not_count(kind):
    student, teacher = logits(torch.float64)
    right, slope = expected(kind, 2.0, torch.float64)
    valid = torch.arange(T) % 3 != 1
    student[~valid], teacher[~valid] = torch.nan, torch.inf  # whatever is there
    x = padded(student, 5).requires_grad_()
    loss = divergence(x, padded(teacher, 5), Divergence(kind, 2.0), valid)
    grad = gradient(loss, x, upstream())
    assert error(loss, right * valid) <= 1e-12
    assert error(grad[:, :V], slope * valid[:, None]) <= 1e-12 and bool((grad[:, V:] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 88.0, -88.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -1e4, 1e4], [0.0, 88.0, -90.0]])
    loss = divergence(student, teacher, Divergence(kind))
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and student.grad is not None and bool(student.grad.isfinite().all())


def sharded(kind: str, dtype: torch.dtype, padding: int) -> list[tuple[Any, ...]]:
    """This rank's [loss, gradient of its columns] for each temperature, and what was sent."""
    cuts = list(CUTS[comm.world_size()])
    cuts[-1] += padding
    out = []
    for temperature in TEMPERATURES:
        student, teacher = (padded(x, padding).split(cuts, 1)[comm.rank()] for x in logits(dtype))
        x = student.clone().requires_grad_()
        comm.calls.clear()
        loss = divergence(x, teacher, Divergence(kind, temperature), sharded=True)
        forward = dict(comm.calls)
        grad = gradient(loss, x, upstream().to(loss.dtype))
        out.append((loss.detach(), grad, forward, dict(comm.calls)))
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_sharded_by_vocabulary(ranks, n, dtype):
    for kind in KINDS:
        results = ranks(n, sharded, kind, dtype, 6)
        for i, temperature in enumerate(TEMPERATURES):
            right, slope = expected(kind, temperature, dtype)
            loss, _, forward, both = results[0][i]
            assert all(torch.equal(loss, result[i][0]) for result in results), "the ranks must agree bit for bit"
            assert error(loss, right) <= min(BOUND[dtype], 5e-6)
            grad = torch.cat([result[i][1] for result in results], 1)
            assert error(grad[:, :V], slope) <= BOUND[dtype] and bool((grad[:, V:] == 0).all())
            assert forward == both == {"all_reduce": 3 if kind == "jensen_shannon" else 2}


def payloads(kind: str) -> list[tuple[int, ...]]:
    sent, send = [], comm.all_reduce
    comm.all_reduce = lambda t, op="sum": sent.append(tuple(t.shape)) or send(t, op)  # type: ignore[func-returns-value]
    try:
        student, teacher = logits(torch.float32)
        divergence(student, teacher, Divergence(kind), sharded=True)
    finally:
        comm.all_reduce = send
    return sent


def test_what_is_sent():
    assert payloads("forward") == payloads("reverse") == [(2, T), (3, T)]
    assert payloads("jensen_shannon") == [(2, T), (2, T), (2, T)]


def known_of(teacher: torch.Tensor, k: int, temperature: float) -> TopK:
    log_probs = (teacher.double() / temperature).log_softmax(1)
    top = log_probs.topk(k, dim=1)
    rest = log_probs.scatter(1, top.indices, -torch.inf).logsumexp(1)
    return TopK(top.indices, top.values, rest, torch.zeros_like(rest))


def merged(student: torch.Tensor, known: TopK, temperature: float) -> torch.Tensor:
    """Forward KL of the distributions over k + 1 events, by the definition."""
    q = (student.double() / temperature).softmax(1)
    inside = q.gather(1, known.ids)
    rest = q.scatter(1, known.ids, 0).sum(1, keepdim=True)
    q = torch.cat([inside, rest], 1)
    p = torch.cat([known.log_probs, known.tail[:, None]], 1).exp()
    return temperature**2 * torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(1)


def sharded_topk(k: int, dtype: torch.dtype, temperature: float) -> tuple[Any, ...]:
    student, teacher = logits(dtype)
    known = known_of(teacher, k, temperature)
    cuts = CUTS[comm.world_size()]
    x = student.split(cuts, 1)[comm.rank()].clone().requires_grad_()
    comm.calls.clear()
    first = sum(cuts[: comm.rank()])
    loss = topk_divergence(x, known, Divergence(temperature=temperature), sharded=True, first=first)
    return loss.detach(), gradient(loss, x, upstream().to(loss.dtype)), dict(comm.calls)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(("k", "temperature"), [(16, 1.0), (1, 2.0), (V - 1, 4.0)])
def test_topk_with_tail(ranks, n, k, temperature):
    for dtype in (torch.float64, torch.float32):
        student, teacher = logits(dtype)
        exact = student.double().requires_grad_()
        right = merged(exact, known_of(teacher, k, temperature), temperature)
        slope = gradient(right, exact, upstream())
        results = ranks(n, sharded_topk, k, dtype, temperature)
        grad = torch.cat([result[1] for result in results], 1)
        assert all(error(loss, right, floor=1.0) <= BOUND[dtype] for loss, *_ in results)
        assert error(grad, slope) <= BOUND[dtype]
        assert all(calls == {"all_reduce": 2} for *_, calls in results)


def test_topk_without_tail_and_with_nearly_nothing_else():
    student, teacher = logits(torch.float64)
    how = Divergence(temperature=2.0)
    x = student.requires_grad_()
    loss = topk_divergence(x, known_of(teacher, V, 2.0), how)  # all entries: the tail is empty
    right, slope = expected("forward", 2.0, torch.float64)
    assert error(loss, right) <= 1e-12 and error(gradient(loss, x, upstream()), slope) <= 1e-12
    numbers = (torch.tensor(x).double() for x in ([[-40.0]], [-1e-17], [0.0]))
    tiny = TopK(torch.tensor([[3]]), *numbers)
    loss = topk_divergence(x[:1], tiny, how)
    assert error(loss, merged(x[:1], tiny, 2.0)) <= 1e-12
    assert bool(gradient(loss, x, upstream()[:1]).isfinite().all())


def test_topk_of_invalid_tokens():
    student, teacher = logits(torch.float64)
    known, valid = known_of(teacher, 8, 1.0), torch.arange(T) % 2 == 0
    student[~valid] = torch.nan
    x = student.requires_grad_()
    loss = topk_divergence(x, known, Divergence(), valid)
    right = merged(x[valid], known_of(teacher[valid], 8, 1.0), 1.0)
    assert bool((loss[~valid] == 0).all()) and error(loss[valid], right) < 1e-12
    assert bool((gradient(loss, x, upstream())[~valid] == 0).all())


def shared_sum() -> tuple[float, int]:
    """Each rank has tokens of its own, a different number of which count: the sum over the global count."""
    student, teacher = logits(torch.float64, tokens=24)
    valid = torch.arange(24) % 5 != 0
    valid[:6] = False  # at 4 ranks, rank 0 has none
    own = slice(comm.rank() * 24 // comm.world_size(), (comm.rank() + 1) * 24 // comm.world_size())
    loss = divergence(student[own], teacher[own], Divergence("reverse", 2.0), valid[own]).sum()
    total = comm.all_reduce(torch.stack([loss, valid[own].sum().double()]))
    return float(total[0] / total[1]), int(valid[own].sum())


def test_unequal_counts_of_valid_tokens(ranks):
    single = ranks(1, shared_sum)[0][0]
    for n in (2, 3, 4):
        results = ranks(n, shared_sum)
        assert len({count for _, count in results}) > 1
        assert all(mean == pytest.approx(single, rel=1e-13) for mean, _ in results)


def test_label_mixing():
    """Mixed losses are the cross-entropy to mixed probabilities, but for the teacher's entropy."""
    student, teacher = logits(torch.float64)
    labels = torch.arange(T) % V
    target = 0.3 * F.one_hot(labels, V) + 0.7 * teacher.softmax(1)
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1)
    found = mixed(F.cross_entropy(student, labels, reduction="none"), divergence(student, teacher, Divergence()), 0.7)
    assert torch.allclose(found, F.cross_entropy(student, target, reduction="none") - 0.7 * entropy, atol=1e-12)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kind": "sideways"}, "forward, reverse, jensen_shannon"),
        ({"temperature": 0.0}, "temperature 0.0: must be above 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"beta": 1.0}, "beta 1.0"),
    ],
)
def test_what_is_refused(keys, said):
    with pytest.raises(UserError, match=said):
        Divergence(**keys)


def test_shapes_that_do_not_fit():
    with pytest.raises(UserError, match=r"student logits \[2, 3\] and teacher logits \[2, 4\]"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4), Divergence())
    known = TopK(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(UserError, match="a stored top-k serves forward alone"):
        topk_divergence(torch.zeros(2, 3), known, Divergence("reverse"))
