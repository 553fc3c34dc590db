"""Applying a plan: what survives, state dicts and optimizer moments, files, and plans that do not fit."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dist_compress import speedup
from dist_compress.errors import UserError
from dist_compress.speedup import Plan, apply, apply_to_state, verify
from dist_compress.speedup.plan import GraphRewrite, Swap


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)
    )


def masked(norm=True):
    """Channels 1 and 6 masked; without `norm` the shift of the norm leaks and is folded."""
    model = network()
    with torch.no_grad():
        model[1].bias.uniform_(0.5, 1.0)
        model[0].weight[[1, 6]] = 0
        if norm:
            model[1].weight[[1, 6]] = 0
            model[1].bias[[1, 6]] = 0
    return model


X = torch.randn(1, 3, 6, 6)
LEFT = [0, 2, 3, 4, 5, 7]


def test_modules_flags_and_dtype_survive():
    model = masked().to(torch.bfloat16).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[0].weight.mark = "mine"
    model[1].eval()
    hooked = []
    model[0].register_forward_hook(lambda *_: hooked.append(1))
    children = list(model)
    plan = speedup.plan(model, (X.bfloat16(),))
    assert apply(model, plan) is model and [a is b for a, b in zip(model, children, strict=True)] == [True] * 4
    weight = model[0].weight
    assert weight.dtype == torch.bfloat16 and not weight.requires_grad and weight.mark == "mine"
    assert weight.is_contiguous(memory_format=torch.channels_last) and model[3].weight.requires_grad
    assert [m.training for m in model] == [True, False, True, True]
    hooked.clear()
    model.train()(X.bfloat16()).sum().backward()
    assert hooked == [1] and model[3].weight.grad.shape == (4, 6, 1, 1)
    assert model[1].running_mean.shape == (6,) and model[1].num_batches_tracked == 1


def test_fresh_model_loads_the_small_state():
    model = masked(norm=False)
    plan = speedup.plan(model, (X,))
    small = apply(copy.deepcopy(model), plan)
    assert "3.bias" in plan.bias
    again = apply(network(), plan)
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(X), small.eval()(X)) and verify(model.eval()(X), small(X)) < 1e-5


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def test_plan_on_state_dict_and_adam_state_equals_plan_on_model():
    model = masked()
    plan = speedup.plan(model, (X,))
    whole = network()
    optimizer = torch.optim.Adam(whole.parameters())
    train(whole, optimizer, 2)
    state = apply_to_state(plan, whole.state_dict())
    names = [name for name, _ in whole.named_parameters()]
    moments = {
        key: apply_to_state(plan, {n: optimizer.state[p][key] for n, p in whole.named_parameters()})
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    for name, parameter in whole.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            by_hand = optimizer.state[parameter][key]
            for dim, index in plan.keep.get(name, {}).items():
                by_hand = by_hand[(slice(None),) * dim + (index,)]
            assert torch.equal(moments[key][name], by_hand)
    apply(whole, plan)
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    for name, parameter in whole.named_parameters():
        assert moments["exp_avg"][name].shape == moments["exp_avg_sq"][name].shape == parameter.shape
        assert moments["step"][name].dim() == 0
    assert names == [name for name, _ in whole.named_parameters()]


def test_files_round_trip(tmp_path):
    plan = speedup.plan(masked(norm=False), (X,))
    plan.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded.fingerprint() == plan.fingerprint() and loaded.attrs == plan.attrs
    assert loaded.blocked == plan.blocked and list(loaded.keep) == list(plan.keep)
    assert loaded.keep["0.weight"][0].tolist() == LEFT == plan.keep["0.weight"][0].tolist()
    assert torch.equal(loaded.bias["3.bias"], plan.bias["3.bias"])
    assert loaded.shapes == plan.shapes and loaded.shapes["0.weight"] == (8, 3, 3, 3)
    loaded.keep["0.weight"][0][0] = 1
    assert loaded.fingerprint() != plan.fingerprint()


def test_damaged_files_are_refused(tmp_path):
    plan = speedup.plan(masked(), (X,))
    with pytest.raises(UserError, match="cannot read plan.json"):
        Plan.load(tmp_path)
    plan.save(tmp_path)
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"0.out_channels": 6', '"0.out_channels": 5'))
    with pytest.raises(UserError, match="fingerprints differ"):
        Plan.load(tmp_path)


def test_a_plan_of_another_model_changes_nothing():
    plan = speedup.plan(masked(), (X,))
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with pytest.raises(UserError, match=r"'0\.weight' has shape \(4, 3, 3, 3\)"):
        apply(other, plan)
    assert other[0].weight.shape == (4, 3, 3, 3) and other[1].weight.shape == (4,)
    with pytest.raises(UserError, match="does not exist here"):
        apply(nn.Linear(3, 3), plan)


def test_a_module_registered_twice_is_sliced_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.also_a = self.a

        def forward(self, x):
            return self.b(self.a(x).relu())

    model = Twice()
    with torch.no_grad():
        model.a.weight[2] = 0
        model.a.bias[2] = 0
    x = torch.randn(3, 4)
    reference = model(x)
    plan = speedup.plan(model, (x,))
    apply(model, plan)
    assert model.also_a is model.a and model.a.weight.shape == (5, 4)
    assert verify(reference, model(x)) < 1e-6


def test_nothing_masked_is_an_empty_plan():
    plan = speedup.plan(network(), (X,))
    assert not plan.keep and not plan.attrs and not plan.bias and not plan.blocked


def test_making_a_plan_leaves_the_model_alone():
    model = masked()
    state = copy.deepcopy(model.state_dict())
    speedup.plan(model, (X,))
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_plan_of_tied_tensors_is_saved(tmp_path):
    """Tied parameters share one index tensor, which the file format refuses."""
    index = torch.arange(3)
    plan = Plan({"a.weight": {0: index}, "b.weight": {0: index}})
    plan.save(tmp_path)
    assert Plan.load(tmp_path).fingerprint() == plan.fingerprint()


def test_every_field_of_a_plan_is_saved_and_told_by_the_fingerprint(tmp_path):
    whole = Plan(
        swaps={"norm": Swap("exact_norm", {"width": 8, "eps": 1e-5, "centred": True})},
        resized={"op": {"input0": {1: torch.tensor([0, 2])}, "core.weight": {0: torch.tensor([1])}}},
        graphs={"attn": GraphRewrite(((X, [2, None]), {"mask": (True, X[0])}), "abc", {"view": {"1.2": 3}})},
        config={"hidden_size": 8},
    )
    whole.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded.fingerprint() == whole.fingerprint() and loaded.swaps == whole.swaps and loaded.config == whole.config
    resized = loaded.resized["op"]
    assert resized["input0"][1].tolist() == [0, 2] and resized["core.weight"][0].tolist() == [1]
    (x, rest), kwargs = loaded.graphs["attn"].inputs
    assert torch.equal(x, X) and rest == [2, None] and kwargs["mask"][0] is True and type(kwargs["mask"]) is tuple
    for name in ("swaps", "resized", "graphs", "config"):
        assert replace(whole, **{name: {}}).fingerprint() != whole.fingerprint(), name
    other = replace(whole, graphs={"attn": replace(whole.graphs["attn"], rewrites={"view": {"1.2": 4}})})
    assert other.fingerprint() != whole.fingerprint()


@pytest.mark.parametrize(
    "damage",
    [
        {},  # applied before
        {"bias": {"1.bias": torch.zeros(5)}},
        {"bias": {"9.bias": torch.zeros(5)}},
        {"attrs": {"0.size": 3}},
        {"swaps": {"0": Swap("unknown")}},
        {"swaps": {"9": Swap("slim_attention")}},
        {"config": {"hidden_size": 3}},
    ],
)
def test_a_plan_that_fails_anywhere_changes_nothing(damage):
    plan = speedup.plan(masked(), (X,))
    model = masked() if damage else apply(masked(), plan)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="speedup plan"):
        apply(model, replace(plan, **damage))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].out_channels == (8 if damage else 6)


def test_a_plan_that_removes_nothing_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
    plan = speedup.plan(model, (torch.randn(1, 4),))
    assert plan == Plan(blocked=plan.blocked) and plan.blocked[0].count == 1


def test_a_plan_for_a_model_without_what_a_method_added():
    index = torch.tensor([0, 2])
    graphs = {"block": GraphRewrite(((), {}), "", {}, ("block.inner",))}
    plan = Plan({"a.weight": {0: index}, "a.mask": {1: index}}, shapes={"a.weight": (3, 3), "a.mask": (1, 3)})
    assert list(plan.without(["a.mask"]).keep) == list(plan.without(["a.mask"]).shapes) == ["a.weight"]
    assert Plan(graphs=graphs).without(["block.inner.mask"]).graphs == graphs  # runs its own code
    with pytest.raises(UserError, match="block.other.mask acts inside of block, whose code runs as a recorded graph"):
        Plan(graphs=graphs).without(["block.other.mask"])
