"""From zeros to a verified smaller copy in one call."""

import copy

import pytest
import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup import speedup
from dist_compress.speedup.fresh import redrawn, variants, with_batch


class Branch(nn.Module):
    """What a removed channel would be depends on the sign of one number of the input."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden.relu() if bool(x.flatten()[0] > 0) else hidden.sigmoid())


def zeroed(model, fqns, count=3):
    with torch.no_grad():
        for fqn in fqns:
            model.get_parameter(fqn)[:count] = 0
    return model


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_a_smaller_copy_and_a_report():
    model = zeroed(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), ["0.weight", "0.bias"])
    before = state(model)
    small, report = speedup(model, (torch.randn(2, 4),))
    assert small[0].weight.shape == (5, 4) and small[2].weight.shape == (3, 5) and small.training
    assert report.parameters == (67, 43) and report.macs == (112, 70)
    assert report.difference < 1e-12 and report.verified.dtype == torch.float64
    assert report.verified.inputs == ("the example", "fresh values", "fresh values", "batch size 4")
    assert set(report.seconds) == {"plan", "apply", "verify", "measure"} and "67 -> 43" in str(report)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not own & {p.untyped_storage().data_ptr() for p in small.parameters()}


def test_masks_leave_the_model_as_it_is():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    before, gone = state(model), torch.arange(8) < 3
    small, report = speedup(model, (torch.randn(2, 4),), masks={"0.weight": ~gone[:, None], "0.bias": ~gone})
    assert small[0].weight.shape == (5, 4) and report.difference < 1e-12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_branch_that_the_example_did_not_take_is_refused_by_name():
    torch.manual_seed(0)
    model = zeroed(Branch(), ["fc1.weight", "fc1.bias"])
    example = torch.randn(2, 4)
    example[0, 0] = example.abs().max()
    before = state(model)
    with pytest.raises(UserError, match=r"on fresh values\. The first difference is addmm in fc2\."):
        speedup(model, (example,))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    small, report = speedup(model, (example,), barrier=["fc1"])  # the way out that the message names
    assert report.parameters[0] == report.parameters[1]


def test_norm_plain_reports_what_it_changes():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    zeroed(model, ["0.weight", "0.bias", "1.weight", "1.bias"])
    small, report = speedup(model, (torch.randn(2, 4),), norm="plain")
    assert small[0].weight.shape == (5, 4) and report.difference > 1e-3
    small, report = speedup(model, (torch.randn(2, 4),), norm="exact")
    assert small[0].weight.shape == (5, 4) and report.difference < 1e-6


def test_a_model_that_holds_its_type_and_its_batch_is_compared_as_far_as_it_runs():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            assert x.shape[0] == 2
            return self.fc2(self.fc1(x.float()).relu())

    _, report = speedup(zeroed(Fixed(), ["fc1.weight", "fc1.bias"]), (torch.randn(2, 4),))
    assert report.verified.dtype is None and report.verified.refused == ("batch size 4",)
    assert report.parameters == (67, 43)


def test_fresh_inputs_stay_in_range():
    mask, ids = torch.tensor([[True, False]]), torch.arange(12).view(2, 6)
    added = torch.tensor([[0.0, -torch.inf]])
    values = {"x": torch.rand(2, 6), "ids": ids, "mask": mask, "added": added, "kind": torch.zeros(2, 6).long()}
    new = redrawn(((), copy.deepcopy(values)), torch.Generator().manual_seed(0))[1]
    for name in ("mask", "added", "kind"):
        assert torch.equal(new[name], values[name])
    for name in ("x", "ids"):
        assert not torch.equal(new[name], values[name])
        assert torch.equal(new[name].flatten().sort().values, values[name].flatten().sort().values)
    assert redrawn(torch.zeros(3), torch.Generator().manual_seed(0)).std() > 0
    wide = with_batch(values, 5)
    assert wide["x"].shape == (5, 6) and wide["mask"].shape == (1, 2)
    assert len(list(variants(((torch.tensor(1.0),), {})))) == 3
