"""nn.Bilinear: a product of three, of which each dim may shrink."""

import copy

import torch
from torch import nn

from dist_compress import speedup


class TwoSided(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.pair = nn.Linear(4, 6), nn.Linear(4, 5), nn.Bilinear(6, 5, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.pair(self.left(x), self.right(x).sigmoid()).relu())


def test_bilinear_layers_shrink_along_all_three_dims():
    torch.manual_seed(0)
    model, x = TwoSided().double(), torch.randn(2, 7, 4).double()
    coupled = speedup.coupling(model, (x,))
    groups = {g.name: g for g in coupled.groups}
    assert not groups["left"].blocked and not groups["pair"].blocked
    assert "cannot fold" in groups["right"].blocked  # sigmoid makes a half of a zero
    assert [layer.macs for layer in coupled.layers if layer.fqn == "pair"][0] == 7 * 6 * 5 * 8
    speedup.mask_units(model, groups["left"], torch.tensor([0, 4]))
    speedup.mask_units(model, groups["pair"], torch.tensor([1, 2, 7]))
    with torch.no_grad():
        model.pair.weight[:, :, 3] = 0
    small = speedup.apply(copy.deepcopy(model), speedup.plan(model, (x,)))
    assert small.pair.weight.shape == (5, 4, 4) and small.right.out_features == 4
    assert (small.pair.in1_features, small.pair.in2_features, small.pair.out_features) == (4, 4, 5)
    x = torch.randn(3, 2, 4).double()
    assert speedup.verify(model(x), small(x)) < 1e-12
