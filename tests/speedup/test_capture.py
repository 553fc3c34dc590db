"""One capture serves coupling and plans; settings and masks are checked before the work."""

import copy

import pytest
import torch
from torch import nn

from dist_compress import speedup
from dist_compress.errors import UserError


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()


X = (torch.randn(1, 3, 4, 4),)


def test_a_capture_serves_coupling_and_plans_of_changed_weights():
    model = chain()
    given = speedup.capture(model, X)
    recorded = given.trace
    assert [g.num_units for g in speedup.coupling(given).groups if not g.blocked] == [8, 6]
    assert not speedup.plan(given).keep
    for group in speedup.coupling(given).groups[:2]:
        speedup.mask_units(model, group, torch.tensor([0, 2]))
    plan = speedup.plan(given)
    assert plan.fingerprint() == speedup.plan(model, X).fingerprint()
    assert plan.keep["0.weight"][0].tolist() == [1, 3, 4, 5, 6, 7]
    assert given.trace is recorded, "the program did not change, so it is not recorded again"


def test_masks_as_data_are_zeros_of_the_weights():
    model, mask = chain(), torch.ones(8, dtype=torch.bool)
    mask[[1, 5]] = False
    before = copy.deepcopy(model.state_dict())
    plan = speedup.plan(model, X, masks={"0.weight": mask[:, None, None, None], "0.bias": mask})
    assert plan.keep["2.weight"][1].tolist() == [0, 2, 3, 4, 6, 7]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "masks, text",
    [
        ({"0.weigth": torch.ones(8, dtype=torch.bool)}, "0.weight"),
        ({"0.bias": torch.ones(8)}, "bool"),
        ({"0.weight": torch.ones(8, dtype=torch.bool)}, "broadcastable"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, text):
    with pytest.raises(UserError, match=text):
        speedup.plan(chain(), X, masks=masks)


def test_keep_and_barrier_say_so():
    groups = speedup.coupling(chain(), X, keep=["0.*"]).groups
    assert [bool(g.blocked) for g in groups] == [True, False, True]
    assert groups[0].blocked == "is kept by the setting keep='0.*'"
    groups = speedup.coupling(chain(), X, barrier=["2"]).groups
    assert [g.blocked for g in groups[:2]] == ["is kept by the setting barrier='2'"] * 2
    model = chain()
    with torch.no_grad():
        model[2].weight[:3] = model[2].bias[:3] = 0
    assert "2.weight" in speedup.plan(model, X, keep=["0.weight"]).keep
    assert not speedup.plan(model, X, keep=["2"]).keep


@pytest.mark.parametrize("settings", [{"keep": ["0.wieght"]}, {"barrier": ["9"]}, {"norm": "none"}, {"keep": "0"}])
def test_settings_that_do_not_fit_are_refused(settings):
    name = next(iter(settings))
    with pytest.raises(UserError, match=name):
        speedup.capture(chain(), X, **settings)


def test_a_capture_has_its_own_settings():
    with pytest.raises(UserError, match="keep"):
        speedup.plan(speedup.capture(chain(), X), keep=["0.weight"])
    with pytest.raises(UserError, match="round_to"):
        speedup.plan(chain(), X, round_to=0)
