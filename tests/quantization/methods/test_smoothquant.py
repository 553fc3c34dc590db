"""SmoothQuant by hand, and what it is for."""

from __future__ import annotations

import pytest
import torch
from block_nets import Block, attached, micro, shown
from torch import nn

from dist_compress.errors import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(2), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([16.0, 1.0]))
            self.a.weight.copy_(torch.tensor([[0.25, -2.0], [0.5, 1.0]]))
            self.b.weight.copy_(torch.tensor([[-1.0, 4.0]]))

    def forward(self, x):
        y = self.norm(x)  # of two numbers: (-1, 1) or (1, -1), times the weight
        return self.a(y) + self.b(y)


@pytest.mark.parametrize(
    ("alpha", "scales"),
    [
        # max abs x: 16, 1; max abs w of both layers: 1, 4
        (0.5, (4.0, 0.5)),  # sqrt(16 / 1), sqrt(1 / 4)
        (0.25, (2.0, 0.25**0.75)),  # 16^(1/4) / 1, 1 / 4^(3/4)
        (1.0, (16.0, 1.0)),
        (0.0, (1.0, 0.25)),
    ],
)
def test_formula(alpha, scales):
    model = Net()
    quantizer = attached(model, ((torch.tensor([[1.0, 9.0]]),), {}), 1, method="smoothquant", options={"alpha": alpha})
    shown(quantizer, lambda step, j: torch.tensor([[1.0, 9e3], [9e3, 1.0]]))
    s = torch.tensor(scales)
    torch.testing.assert_close(model.norm.weight.detach(), torch.tensor([16.0, 1.0]) / s)
    torch.testing.assert_close(model.a.weight.detach(), torch.tensor([[0.25, -2.0], [0.5, 1.0]]) * s)
    torch.testing.assert_close(model.b.weight.detach(), torch.tensor([[-1.0, 4.0]]) * s)


def test_a_channel_that_is_always_zero_stays():
    model = Net()
    with torch.no_grad():
        model.norm.weight[1] = 0.0
    shown(attached(model, ((torch.tensor([[1.0, 9.0]]),), {}), 1, method="smoothquant"),
          lambda step, j: torch.tensor([[1.0, 9e3]]))  # fmt: skip
    assert model.norm.weight.tolist() == pytest.approx([4.0, 0.0])
    assert model.a.weight[:, 1].tolist() == [-2.0, 1.0]


def error(method: str, outlier: float) -> float:
    """Relative, of the outputs of a block with an outlier before its MLP, all int8."""
    model, before = Block(), Block()
    with torch.no_grad():
        for net in (model, before):
            net.norm2.weight[5] = outlier
            net.gate.weight[:, 5] = net.up.weight[:, 5] = 0.01
    quantizer = shown(attached(model, method=method, config_list=[{"op_types": ["Linear"]}]))
    quantizer.begin()
    x = torch.cat([micro(7, j) for j in range(4)])
    with torch.no_grad():
        return float((model(x) - before(x)).norm() / before(x).norm())


def test_outliers_cost_less_than_with_ptq():
    assert error("smoothquant", 100.0) < 0.6 * error("ptq", 100.0)


def test_refusals():
    with pytest.raises(UserError, match="options.alpha=1.5: must be at least 0 and at most 1"):
        attached(Block(), method="smoothquant", options={"alpha": 1.5})
