"""Norm modules that end with an activation, as timm has them for images."""

import copy

import pytest
import torch
from torch import nn

from dist_compress import speedup
from dist_compress.speedup.norms import formula_of


class NormAct(nn.Module):
    def __init__(self, width, act):
        super().__init__()
        self.weight, self.eps, self.act = nn.Parameter(torch.rand(width) + 0.5), 1e-6, act

    def forward(self, x):
        return self.act(x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) * self.weight[:, None, None])


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.GELU()], ids=repr)
def test_units_behind_it_go_exactly(act):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8, act), nn.Conv2d(8, 4, 3)).double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias, model[1].weight):
            parameter[[1, 5]] = 0
    small, report = speedup.speedup(model, (x,), norm="exact")
    assert small[0].out_channels == 6 and report.difference < 1e-12
    assert speedup.plan(copy.deepcopy(model), (x,)).keep == {}  # without it the width stays


def test_an_activation_that_makes_something_of_zero_is_none_of_these():
    assert formula_of(NormAct(8, nn.Sigmoid())) is None and formula_of(NormAct(8, nn.GELU())) is not None
