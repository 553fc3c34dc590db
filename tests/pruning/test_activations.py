"""Activations as targets: their units, their scores, and how masks act."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from activation_nets import X, held, on, refuse, start
from pruning_nets import NUM_MICRO, Net, means_of, micro_batch, train
from torch import nn

from dist_compress import comm
from dist_compress.blocks import activation_dim
from dist_compress.errors import UserError
from dist_compress.pruning.activations import Activation
from dist_compress.pruning.setting import Setting
from dist_compress.target import Coupling

# ---- what is a unit ----


@pytest.mark.parametrize(
    ("kind", "num_dims", "dim"),
    [
        ("Conv2d", 4, 1), ("Conv1d", 3, 1), ("BatchNorm1d", 3, 1), ("GroupNorm", 3, 1), ("Linear", 3, 2),
        ("Linear", 2, 1), ("Linear", 4, 3), ("LayerNorm", 3, 2), ("Embedding", 3, 2), ("ReLU", 4, 1), ("GELU", 3, 2),
        ("Softmax", 4, 1), ("ReLU", 2, 1), ("MaxPool1d", 3, 1), ("Conv1D", 3, 2),
    ],
)  # fmt: skip
def test_the_channel_dim(kind, num_dims, dim):
    assert activation_dim(kind, num_dims) == dim


@pytest.mark.parametrize(
    ("granularity", "shape", "units"),
    [
        ("per_channel", (2, 4, 6, 8), 4),
        ("element", (2, 4, 6), 24),
        ([3, 4], (2, 4, 6, 8), 16),
        ([[2], "back", -1], (2, 4, 6), 2),
    ],
)
def test_units_by_brute_force(granularity, shape, units):
    setting = Setting("m", "_output_0", granularity=granularity)
    model = SimpleNamespace(get_submodule=lambda name: nn.ReLU())
    found = Activation.of(setting, SimpleNamespace(shape=shape), model)
    assert found.num_units == units
    numbers = torch.arange(int(np.prod(shape))).view(shape)
    by_unit = found.by_unit(numbers)
    assert by_unit.shape == (2, numbers[0].numel() // units, units)
    for unit in range(units):
        kept = torch.arange(units) != unit
        gone = (~found.mask(kept)).expand(1, *shape[1:])
        for sample in range(2):
            assert set(numbers[sample][gone[0]].tolist()) == set(by_unit[sample, :, unit].tolist())


def test_channels_need_no_fixed_size_but_blocks_do():
    pruner, model, projection = start(on("a", sparse_ratio=0.5))
    train(pruner, model, projection, range(1))
    model.head = nn.Identity()
    assert (held(model, "a", "_output_0", torch.randn(2, 3, 7, 9)) != 0).any((0, 2, 3)).sum() == 3
    pruner, model, projection = start(on("a", granularity=[2, 2]))
    with pytest.raises(
        UserError, match=r"a._output_0: .*granularity=\[2, 2\] .* the same size, \[6, 4, 4\] .* \[6, 8, 8\]"
    ):
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(UserError, match=r"a._output_0: the mask has shape \(1, 6, 4, 4\), this call \(2, 6, 8, 8\)"):
        with torch.no_grad():
            model(torch.randn(2, 3, 8, 8))


# ---- how masks act ----


@pytest.mark.parametrize(
    ("module", "site"), [("a", "_output_0"), ("a", "_input_0"), ("bn_a", "_input_0"), ("head", "_input_0")]
)
def test_mul_zeroes_and_nothing_else_changes(module, site):
    pruner, model, projection = start(on(module, site, sparse_ratio=0.5))
    plain = Net().eval()
    assert torch.equal(model.eval()(X), plain(X))
    train(pruner, model, projection, range(1))
    plain.load_state_dict(model.state_dict())  # and its keys are as before
    before = held(plain, module, site, X)
    gone = (~pruner.activations.on()[f"{module}.{site}"]).flatten()
    assert int(gone.sum()) == before.shape[1] // 2
    after = held(model, module, site, X)
    expected = before * (~gone).float().view(1, -1, *[1] * (before.dim() - 2))
    assert torch.equal(after, expected)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.softmax, self.out = nn.Linear(8, 24), nn.Softmax(-1), nn.Linear(8, 5)

    def forward(self, x):  # [B, 3, 8]
        q, k, v = self.qkv(x).view(len(x), 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.out((self.softmax(input=q @ k.mT) @ v).transpose(1, 2).flatten(2))


TOKENS = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))


def hear(pruner, model, x, steps=1):
    """Bare steps: forward, backward, decision."""
    for step in range(steps):
        for micro in range(NUM_MICRO):
            model.train()(x * (micro + 1)).square().sum().backward()
            pruner.after_backward(step, micro)
        pruner.after_step(step)


@pytest.mark.parametrize(("options", "constant"), [({}, -1000.0), ({"constant": -7.5}, -7.5)])
def test_add_adds_a_constant_to_what_is_masked(options, constant):
    entry = on("softmax", "_input_", granularity="element", apply_method="add", apply_options=options, sparse_ratio=0.3)
    pruner, model, _ = start(entry, model=Attention(), coupling=Coupling(), example=TOKENS)
    hear(pruner, model, TOKENS)
    [mask] = pruner.activations.on().values()
    assert mask.shape == (1, 2, 3, 3) and int((~mask).sum()) == 5
    plain = Attention()
    logits = []
    hook = plain.softmax.register_forward_pre_hook(
        lambda _, args, kwargs: logits.append(kwargs["input"]), with_kwargs=True
    )
    plain(TOKENS)
    hook.remove()
    plain.softmax.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {"input": kwargs["input"] + constant * (~mask).float()}), with_kwargs=True
    )
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-6, atol=1e-6)
    if constant == -1000:
        probabilities = []
        model.softmax.register_forward_hook(lambda _, args, out: probabilities.append(out))
        model(TOKENS)
        some = mask.any(-1, keepdim=True)  # where a row keeps anything
        assert not probabilities[0][(~mask & some).expand_as(probabilities[0])].any()


def test_an_apply_method_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "halving.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Options:\n    by: float = 2.0\n"
        "def apply(x, mask, options):\n    return x * (mask + (1 - mask) / options.by)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = on("a", apply_method="halving", apply_options={"by": 4})
    assert "config_list[0].apply_method='halving': no such method. Available: add, mul" in refuse(entry)
    (tmp_path / "own").mkdir()
    (tmp_path / "halving.py").rename(tmp_path / "own/halving.py")
    entry["apply_method"] = "own.halving"
    pruner, model, projection = start(entry)
    train(pruner, model, projection, range(1))
    plain = Net()
    plain.load_state_dict(model.state_dict())
    mask = pruner.activations.on()["a._output_0"].float()
    assert torch.equal(held(model, "a", "_output_0", X), held(plain, "a", "_output_0", X) * (mask + (1 - mask) / 4))
    assert "config_list[0].apply_options.times: no such key" in refuse({**entry, "apply_options": {"times": 4}})


# ---- scores ----


def reference(site, formula, of_total, seed=0):
    """Mean over micro-batches of formula(activation, gradient) of a float64 model, [C] each, at the first step."""
    model = Net(seed).double().train()
    total = 0
    for micro in range(NUM_MICRO):
        x, y = micro_batch(0, micro)
        kept = []

        def keep(t, kept=kept):
            kept.append(t.view_as(t) if t.requires_grad else t.clone().requires_grad_())
            kept[0].retain_grad()
            return kept[0]

        module, name = site
        module = model.get_submodule(module)
        if name == "_input_0":
            hook = module.register_forward_pre_hook(lambda _, args, keep=keep: (keep(args[0]),))
        else:
            hook = module.register_forward_hook(lambda _, args, out, keep=keep: keep(out))
        (nn.functional.cross_entropy(model(x.double()), y, reduction="sum") / (4 * NUM_MICRO)).backward()
        hook.remove()
        total = total + formula(kept[0].detach(), kept[0].grad)
    return of_total(total / NUM_MICRO)


def dims(a):
    return [d for d in range(a.dim()) if d != 1]


FORMULAS = {
    "l1_norm": (lambda a, g: a.abs().sum(dims(a)), lambda t: t),
    "level": (lambda a, g: a.abs().sum(dims(a)), lambda t: t),
    "l2_norm": (lambda a, g: a.square().sum(dims(a)), torch.sqrt),
    "taylor": (lambda a, g: (a * g).sum(dims(a)).square(), lambda t: t),
    "apoz": (lambda a, g: (a > 0).double().mean(dims(a)), lambda t: t),
    "mean_activation": (lambda a, g: a.relu().mean(dims(a)), lambda t: t),
    "group_fisher": (lambda a, g: (a * g).unsqueeze(-1).flatten(2).sum(2).square().sum(0), lambda t: t),
}


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("site", [("bn_a", "_output_0"), ("stem", "_input_0"), ("b", "_input_0"), ("head", "_input_0")])
def test_scores_equal_float64_on_one_process(method, site):
    pruner, model, projection = start(on(*site, granularity="per_channel"), method=method)
    scores = []
    pruner._decide_units = lambda fraction, due, found: scores.append(found)
    train(pruner, model, projection, range(1))
    wanted = reference(site, *FORMULAS[method])
    torch.testing.assert_close(scores[0][0].double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_a_gradient_that_comes_another_way_is_not_heard():
    """`a` and the addition read the same tensor; only what flows through `a` is its input's."""
    pruner, model, projection = start(on("a", "_input_0"), method="taylor")
    scores = []
    pruner._decide_units = lambda fraction, due, found: scores.append(found)
    train(pruner, model, projection, range(1))
    wanted = reference(("a", "_input_0"), *FORMULAS["taylor"])
    torch.testing.assert_close(scores[0][0].double(), wanted, rtol=1e-4, atol=0)


def test_an_evaluation_is_not_heard():
    pruner, model, _ = start(on("a"))
    with torch.no_grad():
        model(X * 100)
    model(X).sum().backward()
    pruner.after_backward(0, 0)
    [listener] = pruner.listeners.values()
    plain, seen = Net().train(), []
    plain.a.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    plain(X)
    torch.testing.assert_close(means_of(listener)[0] * NUM_MICRO, seen[0].double().abs().sum((0, 2, 3)))


def unheard(method, module):
    class Idle(Net):
        def forward(self, x):
            if self.training:  # an evaluation runs all of it
                return self.head(self.free(self.depthwise(self.bn(self.stem(x)).detach())).flatten(1))
            return super().forward(x)

    pruner, model, _ = start(on(module), model=Idle(), method=method)
    for micro in range(comm.rank(), NUM_MICRO, comm.world_size()):
        model.train()(X).sum().backward()
        pruner.after_backward(0, micro)
    with pytest.raises(UserError) as error:
        pruner.after_step(0)
    return str(error.value)


def test_what_was_never_heard_is_an_error_on_every_rank(ranks):
    said = unheard("l1_norm", "b")
    assert "b._output_0: pruning.method='l1_norm' heard nothing since the last decision: its module did not run" in said
    for said in ranks(2, unheard, "taylor", "bn"):
        assert "bn._output_0: pruning.method='taylor' heard nothing since the last decision: no gradient" in said


@pytest.mark.parametrize("method", ["fpgm", "slim", "sr_ste"])
def test_methods_that_do_not_score_activations_are_refused(method):
    said = refuse(on("a", granularity="per_channel"), method=method)
    assert f"a._output_0: pruning.method='{method}' does not score activations" in said
