"""Whatever fails, the caller's model and torch are as they were: nothing half done, nothing left patched."""

import copy
import threading

import pytest
import torch
from small_nets import Net, both
from torch import nn
from torch.nn import functional as F

from dist_compress import speedup
from dist_compress.errors import UserError
from dist_compress.speedup import apply


class Fails(nn.Module):
    """Runs `good` times, then fails, in the middle of a model with statistics, hooks and a frozen layer."""

    def __init__(self, error=None, good=0):
        super().__init__()
        self.error, self.good = error or ValueError("no luck"), good

    def forward(self, x):
        self.good -= 1
        if self.good < 0:
            raise self.error
        return x


def network(middle):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), middle, nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()
    )
    with torch.no_grad():
        for name, index in both("0", [1, 2]).items():
            model.get_parameter(name)[index] = 0
    model[1].eval()
    model[5].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    model[1].register_forward_pre_hook(lambda *_: None)
    return model


def state_of(model):
    """Everything that a caller could notice."""
    return {
        "tensors": {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "training": [m.training for m in model.modules()],
        "frozen": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "keys": [sorted(vars(m)) for m in model.modules()],
        "integers": [{k: v for k, v in vars(m).items() if type(v) is int and k != "good"} for m in model.modules()],
        "torch": (
            nn.Module.__call__, torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(), torch.random.get_rng_state().tolist(), threading.active_count(),
            len(torch.overrides._get_current_function_mode_stack()),
        ),
    }  # fmt: skip


def assert_same(before, after):
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, (key, value) in before["tensors"].items():
        assert after["tensors"][name][0] == key, f"{name} is another tensor"
        assert torch.equal(after["tensors"][name][1], value), f"{name} has other values"
    rest = [name for name in before if name != "tensors" and before[name] != after[name]]
    assert not rest, rest


X = torch.randn(2, 3, 6, 6)
CALLS = {
    "plan": lambda m: speedup.plan(m, (X,)),
    "coupling": lambda m: speedup.coupling(m, (X,)),
    "capture": lambda m: speedup.capture(m, (X,)).structure,
    "speedup": lambda m: speedup.speedup(m, (X,)),
    "concrete_trace": lambda m: speedup.concrete_trace(m, (X,)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_fails_is_as_it_was(name):
    model = network(Fails())
    before = state_of(model)
    with pytest.raises((UserError, ValueError), match="no luck"):
        CALLS[name](model)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("good", [1, 2, 3])
@pytest.mark.parametrize("name", ["plan", "coupling", "speedup"])
def test_a_model_that_fails_later_is_as_it_was(name, good):
    """In the rehearsal on a copy, in the run at another batch, in the verification."""
    model = network(Fails(good=good))
    before = state_of(model)
    try:
        CALLS[name](model)
    except (UserError, ValueError):
        pass
    assert_same(before, state_of(model))


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_leaves_everything_as_it_was(name):
    model = network(Fails(KeyboardInterrupt()))
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        CALLS[name](model)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("name", CALLS)
def test_success_leaves_the_model_as_it_was(name):
    model = network(nn.Identity())
    before = state_of(model)
    CALLS[name](model)
    assert_same(before, state_of(model))


def test_a_failure_names_the_module_and_what_was_raised():
    with pytest.raises(UserError, match=r"(?s)'3'.*ValueError: no luck"):
        speedup.plan(network(Fails()), (X,))


def test_settings_and_masks_that_do_not_fit_change_nothing():
    model = network(nn.Identity())
    before = state_of(model)
    for settings in (
        {"norm": "maybe"}, {"round_to": 0}, {"keep": ("nothing.like.this",)}, {"barrier": ("9",)},
        {"masks": {"0.weigth": torch.ones(8, 1, 1, 1, dtype=torch.bool)}},
        {"masks": {"0.weight": torch.ones(7, 1, 1, 1, dtype=torch.bool)}},
    ):  # fmt: skip
        with pytest.raises(UserError):
            speedup.plan(model, (X,), **settings)
    assert_same(before, state_of(model))


def test_a_foreign_plan_changes_nothing():
    plan = speedup.plan(network(nn.Identity()), (X,))
    other = network(nn.Identity())
    other[5] = nn.Conv2d(9, 4, 1)
    before = state_of(other)
    with pytest.raises(UserError, match="5.weight"):
        apply(other, plan)
    assert_same(before, state_of(other))


def test_a_plan_is_applied_once():
    model = network(nn.Identity())
    plan = speedup.plan(model, (X,))
    apply(model, plan)
    assert model[0].out_channels == 6
    before = state_of(model)
    with pytest.raises(UserError, match="before anything is shrunk"):
        apply(model, plan)
    assert_same(before, state_of(model))


def test_a_wrong_rule_changes_nothing_and_the_first_wrong_op_is_named():
    """At one sample what the rule takes for a constant is one, so that only fresh values tell."""
    model = Net(
        lambda m, x: m.last(F.relu(torch.cumsum(m.first(x), 1)) + 1), first=nn.Linear(4, 8), last=nn.Linear(8, 2)
    )
    with torch.no_grad():
        model.first.weight[[1, 6]] = 0
    x = torch.randn(1, 4)
    before = state_of(model)
    with speedup.registered(torch.ops.aten.cumsum.default, speedup.Pointwise()):
        with pytest.raises(UserError, match="first difference is cumsum in the model itself"):
            speedup.speedup(model, (x,))
    assert_same(before, state_of(model))
    small, report = speedup.speedup(model, (x,))
    assert report.difference == 0.0 and small.first.out_features == 8


def test_speedup_works_on_a_copy():
    model = network(nn.Identity())
    held = copy.deepcopy(model)
    small, report = speedup.speedup(model, (X,))
    assert small is not model and small[0].out_channels == 6 and model[0].out_channels == 8
    with torch.no_grad():
        assert speedup.verify(held.eval()(X), small.eval()(X)) < 1e-5
