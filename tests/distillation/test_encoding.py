"""Records of a stored teacher: sizes, round trips, and how far the loss is from that of the whole distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_compress.distillation.encoding import Encoding, pack, unpack
from dist_compress.distillation.losses import Divergence, TopK, divergence, topk_divergence
from dist_compress.errors import UserError


def encode(encoding: Encoding, values: torch.Tensor) -> np.ndarray:
    return encoding.encode(values, torch.arange(len(values)))


@pytest.mark.parametrize(
    ("name", "k", "draws", "size"),
    [
        ("topk_u8", 64, 0, 206), ("topk_fp16", 64, 0, 266), ("topk_u8", 8, 0, 31), ("topk_fp16", 8, 0, 35),
        ("topk_u8", 256, 0, 806), ("topk_u8", 48, 16, 192), ("topk_fp16", 48, 16, 236),
    ],
)  # fmt: skip
def test_bytes_of_a_token(name, k, draws, size):
    encoding = Encoding(name, 128_256, k, (1.0,), draws)
    assert encoding.record_bytes == size == encode(encoding, torch.randn(2, 128_256)).shape[1]


def test_dense_bytes():
    encoding = Encoding.choose("auto", 1000, 64, (1.0,))
    assert encoding.name == "dense_fp16" and encoding.record_bytes == 2000
    assert Encoding.choose("auto", 1001, 64, (1.0,)).name == "topk_u8"


@pytest.mark.parametrize("bits", [1, 7, 8, 17, 18, 31])
def test_packed_ids_are_exact(bits):
    ids = np.random.default_rng(0).integers(0, 2**bits, (5, 13))
    ids[0, :2] = 0, 2**bits - 1
    packed = pack(ids, bits)
    assert packed.shape == (5, -(-13 * bits // 8)) and (unpack(packed, 13, bits) == ids).all()
    assert [*pack(np.array([[5, 1]]), 3)[0]] == [0b10100100]


def logits(classes: int) -> torch.Tensor:
    return 3 * torch.randn(16, classes, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("classes", [300, 2**17, 2**17 + 1])
@pytest.mark.parametrize("name", ["topk_u8", "topk_fp16"])
def test_round_trip(name, classes):
    values = logits(classes)
    known = Encoding(name, classes, 20).decode(encode(Encoding(name, classes, 20), values), 1.0)
    assert isinstance(known, TopK)
    top = values.log_softmax(1).topk(20, dim=1)
    assert torch.equal(known.ids, top.indices)
    spread = top.values[:, :1] - top.values[:, -1:]
    half = 2.0**-9  # of the bounds and of the tail in fp16, relative to the entries' own normalisation
    bound = spread / 510 + half * top.values.abs().amax() if name == "topk_u8" else half * top.values.abs()
    assert bool(((known.log_probs - top.values).abs() <= bound + 2e-3).all())
    mass = known.log_probs.exp().sum(1) + known.tail.exp()
    assert torch.allclose(mass, torch.ones(16), atol=1e-6)


def test_values_lie_within_the_stored_bounds():
    """Linear in the stored range: at most a 510th of it off, before anything is normalised."""
    encoding, values = Encoding("topk_u8", 500, 30), logits(500)
    records = encode(encoding, values)
    top = values.log_softmax(1).topk(30, dim=1).values
    low, high = np.ascontiguousarray(records[:, -4:]).view("<f2").astype(np.float32).T
    assert (low <= top.numpy().min(1)).all() and (high >= top.numpy().max(1)).all()
    first = encoding._id_bytes(30)
    read = low[:, None] + records[:, first : first + 30].astype(np.float32) / 255 * (high - low)[:, None]
    assert (np.abs(read - top.numpy()) <= (high - low)[:, None] / 510 + 1e-5).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_each_stored_temperature_is_served(temperature):
    encoding, values = Encoding("topk_fp16", 400, 40, (1.0, 2.0, 4.0)), logits(400)
    known = encoding.decode(encode(encoding, values), temperature)
    assert isinstance(known, TopK)
    right = (values / temperature).log_softmax(1)
    assert torch.allclose(known.log_probs, right.gather(1, known.ids), atol=2e-2)
    rest = right.scatter(1, known.ids, -torch.inf).logsumexp(1)
    assert torch.allclose(known.tail, rest, atol=5e-3)


def test_other_temperatures_are_refused_and_dense_serves_all():
    encoding = Encoding("topk_u8", 400, 40, (1.0, 2.0))
    with pytest.raises(UserError, match="temperature 3: the stored top-40 serves 1.0, 2.0 only"):
        encoding.decode(encode(encoding, logits(400)), 3.0)
    dense, values = Encoding("dense_fp16", 400), logits(400)
    read = dense.decode(encode(dense, values), 3.0)
    assert isinstance(read, torch.Tensor)
    assert torch.allclose((read / 3).softmax(1), (values / 3).softmax(1), atol=2e-3)


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), student)[0]


def test_the_tail_keeps_the_gradient_close():
    """A top-k that is normalised to 1, as if there were no rest, is far off (the control)."""
    g = torch.Generator().manual_seed(0)
    common = 2 * torch.randn(64, 2000, generator=g)
    teacher, student = (common + torch.randn(64, 2000, generator=g) for _ in range(2))
    student.requires_grad_()
    right = gradient(divergence(student, teacher, Divergence()), student)
    encoding = Encoding("topk_u8", 2000, 64)
    known = encoding.decode(encode(encoding, teacher), 1.0)
    assert isinstance(known, TopK)
    alone = TopK(known.ids, known.log_probs.log_softmax(1), torch.full_like(known.tail, -torch.inf), known.entropy)
    error, biased = (
        float((gradient(topk_divergence(student, k, Divergence()), student) - right).norm() / right.norm())
        for k in (known, alone)
    )
    assert error < 0.2 and biased > 2.5 * error, (error, biased)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_drawn_entries_tell_the_rest_on_average(temperature):
    """One distribution, drawn from for 4000 tokens: the mean is the distribution, and the mean loss and gradient are
    those of it. Each entry comes as often as it should, rounded up or down."""
    values, tokens = logits(300)[:1], 4000
    encoding = Encoding("topk_fp16", 300, 10, (1.0, 2.0), 8)
    known = encoding.decode(encode(encoding, values.expand(tokens, 300)), temperature)
    assert isinstance(known, TopK) and known.ids.shape == (tokens, 18)
    found = torch.zeros(tokens, 300).scatter_add_(1, known.ids, known.log_probs.exp())
    assert torch.allclose(found.sum(1), torch.ones(tokens), atol=1e-5)
    right = (values[0] / temperature).softmax(0)
    rest = right.scatter(0, known.ids[0, :10], 0)
    counts = found / rest.sum() * 8
    expected = rest / rest.sum() * 8
    assert bool((((counts - expected).abs() < 1.02) | (rest == 0)).all())
    assert float((found.mean(0) - right).abs().max()) < 6e-3
    student = logits(300)[1:2].expand(tokens, 300).clone().requires_grad_()
    how = Divergence(temperature=temperature)
    loss, whole = topk_divergence(student, known, how), divergence(student[:1], values, how)
    assert float(loss.detach().mean()) == pytest.approx(float(whole.detach()), rel=1e-2)
    slopes = gradient(loss, student).mean(0), gradient(whole, student)[0]
    lumped = Encoding("topk_fp16", 300, 10, (1.0, 2.0))
    alone = lumped.decode(encode(lumped, values), temperature)
    assert isinstance(alone, TopK)
    control = gradient(topk_divergence(student[:1], alone, how), student)[0]
    error, biased = (float((slope - slopes[1]).norm() / slopes[1].norm()) for slope in (slopes[0], control))
    assert error < 0.02 and biased > 0.15, (error, biased)


def test_draws_depend_on_the_token_alone():
    encoding, values = Encoding("topk_u8", 300, 10, (2.0,), 8), logits(300)
    together, tokens = encode(encoding, values), torch.arange(16)
    for part in tokens.split(5):
        assert (encoding.encode(values[part], part) == together[part.numpy()]).all()
    assert (encoding.encode(values, tokens + 99) != together).any()


def test_certain_and_padded_teachers():
    sure = torch.full((1, 2000), -1e4)
    sure[0, 7] = 1e4
    padded = torch.cat([torch.zeros(1, 3), torch.full((1, 1997), -torch.inf)], 1)
    for name in ("topk_u8", "topk_fp16"):
        encoding = Encoding(name, 2000, 8)
        for values in (sure, padded, torch.zeros(1, 2000)):
            known = encoding.decode(encode(encoding, values), 1.0)
            assert isinstance(known, TopK)
            student = torch.zeros(1, 2000, requires_grad=True)
            loss = topk_divergence(student, known, Divergence())
            assert bool(loss.isfinite()) and bool(gradient(loss, student).isfinite().all())
            right = divergence(student, values, Divergence())
            assert float(loss) == pytest.approx(float(right), abs=0.05)


def test_more_entries_than_classes():
    with pytest.raises(UserError, match="distillation.store.k=64: there are 10 classes"):
        Encoding.choose("topk_u8", 10, 64, (1.0,))
