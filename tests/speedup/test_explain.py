"""The chain of ops from a slice that stays to what forced it."""

import pytest
import torch
from torch import nn

from dist_compress.speedup import Ties, capture, coupling, explain, explain_group


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.conv(x)).relu().flatten(1))


X = (torch.randn(1, 3, 2, 2),)


def masks(model, **rows):
    """{parameter: False at the first rows} of modules and their biases."""
    found = {}
    for name, count in rows.items():
        for fqn, p in model.get_submodule(name).named_parameters(prefix=name):
            found[fqn] = (torch.arange(p.shape[0]) >= count).view(-1, *[1] * (p.dim() - 1))
    return found


def test_the_other_operand_of_a_sum():
    model = Residual()
    [why] = explain(model, X, masks=masks(model, conv=3))
    assert (why.fqn, why.dim, why.count) == ("conv.weight", 0, 3)
    assert why.steps == ("convolution in conv", "add in the model itself")
    assert why.reason == "it is not zero, as its operand from convolution in stem is alive"
    assert str(why).startswith("conv.weight dim 0: 3 kept <- convolution in conv <- add in the model itself <- it is")


def test_slices_with_two_causes_are_told_apart():
    model = Residual()
    mine = masks(model, conv=3, stem=1)
    found = explain(model, X, masks=mine)
    assert [(w.fqn, w.count) for w in found] == [("conv.weight", 2)]  # the first one goes, from both


def test_zeros_of_the_weights_count_as_masks_and_the_output_is_a_cause():
    model = Residual()
    with torch.no_grad():
        model.fc.weight[:2], model.fc.bias[:2] = 0, 0
        model.stem.weight[:, 0] = 0
    by_name = {(w.fqn, w.dim): w for w in explain(model, X)}
    assert by_name["fc.weight", 0].steps[-1].startswith("addmm in fc")
    assert by_name["fc.weight", 0].reason == "is an output of the model"
    assert by_name["stem.weight", 1].reason == "is an input of the model"
    assert not explain(Residual(), X)


def test_what_no_op_forces_has_the_reason_of_the_plan():
    model = Residual()
    found = explain(model, X, masks=masks(model, conv=3, stem=3), round_to=4)
    assert {(w.fqn, w.count, w.steps) for w in found if w.dim == 0} == {("stem.weight", 3, ()), ("conv.weight", 3, ())}
    assert {w.reason for w in found} == {"rounds its dim up to a multiple of 4"}


def test_flattened_positions_are_followed():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x).flatten(1)

    model = Flat()
    [why] = explain(model, X, masks=masks(model, conv=1))
    assert why.count == 1 and why.steps[-1] in ("view in the model itself", "_unsafe_view in the model itself")


@pytest.mark.parametrize("barrier", [(), ("conv",)])
def test_blocked_groups(barrier):
    given = capture(Residual(), X, barrier=barrier)
    ties = Ties(given)
    said = {group.name: explain_group(ties, group) for group in coupling(given).groups if group.blocked}
    assert said["fc"].reason == "is an output of the model" and said["fc"].count == 5
    assert ("stem" in said) == bool(barrier)
    if barrier:
        assert said["stem"].reason == "is kept by the setting barrier='conv'"
