"""Relations of DIST against torch's own correlation."""

import pytest
import torch
from distillation_nets import attach, losses

from dist_compress.distillation.methods.dist import Dist, Options, correlation
from dist_compress.distillation.term import Moment


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)


def test_correlation():
    a, b = logits()
    right = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)])
    assert torch.allclose(correlation(a, b), right, atol=1e-6)
    assert torch.allclose(correlation(a, 3 * a + 2), torch.ones(6), atol=1e-6)


def test_the_loss_by_hand():
    a, b = logits()
    s, t = (a / 2).softmax(1), (b / 2).softmax(1)
    inter = sum(1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s, t, strict=True))
    intra = sum(1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s.T, t.T, strict=True)) / 5 * 6
    batch = {"targets": torch.zeros(6, dtype=torch.int64)}
    term = Dist("dist", Options(inter=2.0, intra=0.5))
    assert float(term.loss(Moment(0, 2.0), batch, a, b)) == pytest.approx(4 * float(2 * inter + 0.5 * intra), rel=1e-5)
    assert float(term.loss(Moment(0, 2.0), batch, a, a)) == pytest.approx(0, abs=1e-4)


def test_beside_hidden_states():
    entries = [{"op_names": ["layer2"], "method": "fitnets"}]
    distiller, student, _ = attach(entries, method="dist", options={"intra": 0.0})
    assert list(losses(distiller, student)) == ["dist_loss", "fitnets/layer2._output_0_loss"]
