"""Activations as targets: their units, scores, masks and how these act, and what is left of them after a shrink."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pruning_nets import COUPLING, NUM_MICRO, Net, attach, config, means_of, micro_batch, train
from torch import nn

from dist_compress import comm
from dist_compress.blocks import activation_dim
from dist_compress.errors import UserError
from dist_compress.pruning.activations import Activation
from dist_compress.pruning.setting import Setting
from dist_compress.target import Coupling

LATER = {"name": "one_shot", "start": "1steps", "end": "1steps"}
SOON = {"name": "linear", "start": "1steps", "end": "3steps", "num_decisions": 3}
X = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def start(*entries, model=None, coupling=COUPLING, schedule=LATER, example=None, **keys):
    return attach(config(list(entries), schedule=schedule, **keys), model, coupling, example=example)


def on(module, site="_output_0", **keys):
    return {"op_names": [module], "target_names": [site], **keys}


def held(model, module, site, x):
    """The tensor at a site."""
    seen = []
    module = model.get_submodule(module)
    if site.startswith("_input_"):
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        hook = module.register_forward_hook(lambda _, args, out: seen.append(out))
    model.eval()(x)
    hook.remove()
    return seen[0]


def refuse(*entries, **keys) -> str:
    with pytest.raises(UserError) as error:
        start(*entries, **keys)
    return str(error.value)


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


# ---- how much ----


def decided(*entries, model=None, **keys):
    pruner, model, projection = start(*entries, **{"schedule": SOON, **keys}, model=model)
    train(pruner, model, projection, range(3))
    gone = {path: (~mask).flatten() for path, mask in pruner.activations.on().items()}
    return gone, pruner, model


def test_ratios_thresholds_bounds_parts_and_schedule():
    gone, pruner, _ = decided(
        on("a", sparse_ratio=0.34),
        on("free", sparse_threshold=1e9, max_sparse_ratio=0.4),
        on("bn", sparse_threshold=0.0, min_sparse_ratio=0.3),
        on("b", internal_metric_block=2, sparse_ratio=0.5),
    )
    assert {path: int(g.sum()) for path, g in gone.items()} == {
        "a._output_0": 2, "free._output_0": 4, "bn._output_0": 3, "b._output_0": 4,
    }  # fmt: skip
    assert gone["b._output_0"].view(2, 4).sum(1).tolist() == [2, 2]
    assert [round(ratio, 3) for _, ratio, _ in pruner.history] == [0.031, 0.188, 0.406]
    rows = {row["name"]: row for row in pruner.results()["groups"]}
    assert rows["a._output_0"]["given"] == pytest.approx(2 / 6) and rows["a._output_0"]["asked"] == 0.34
    assert len({mark for _, _, mark in pruner.history}) == 3


def test_a_global_group_ranks_all_and_bounds_hold():
    entries = {"op_names": ["a", "free", "bn"], "target_names": ["_output_"], "global_group_id": 1, "sparse_ratio": 0.5}
    gone, pruner, _ = decided(entries, {"op_names": ["free"], "target_names": ["_output_0"], "max_sparse_ratio": 0.2})
    assert sum(int(g.sum()) for g in gone.values()) == 12 and int(gone["free._output_0"].sum()) <= 2
    said = refuse(entries, compute="params")
    assert (
        "pruning.compute=params: bn._output_0, a._output_0, free._output_0 are activations, which have no cost" in said
    )


def test_a_dependency_group_shares_one_mask_by_index():
    entry = {"op_names": ["bn", "b"], "target_names": ["_output_0"], "dependency_group_id": "stream"}
    gone, pruner, _ = decided(entry)
    assert torch.equal(gone["bn._output_0"], gone["b._output_0"]) and int(gone["b._output_0"].sum()) == 4
    assert [s.name for s in pruner.sets] == ["stream"]
    assert "Members share one mask, so their sizes must be equal" in refuse({**entry, "op_names": ["bn", "a"]})


def test_align_between_activations_and_weights_in_both_directions():
    def align(module, target, dims, **keys):
        return {"align": {"module_name": module, "target_name": target, "dims": dims}, **keys}

    pruner, model, projection = start(
        on("a", "_output_0", sparse_ratio=0.5),
        on("bn_a", "_input_input", **align("a", "_output_0", [1])),
        {"op_names": ["b"], "granularity": "in_channel", **align("bn_a", "_input_0", [-3])},
        {"op_names": ["free"], "sparse_ratio": 0.3, "dependency_group_id": None},
        on("free", "_output_0", **align(None, "weight", [0])),
        {"op_names": ["stem"], "granularity": [2, 3, 3, 3], "sparse_ratio": 0.5},
        on("a", "_input_0", granularity=[[4], "back", -1], **align("stem", "weight", [0])),
    )
    train(pruner, model, projection, range(1))
    masks, acts = pruner.masks(), {path: mask.flatten() for path, mask in pruner.activations.on().items()}
    assert int((~acts["a._output_0"]).sum()) == 3
    assert torch.equal(acts["bn_a._input_0"], acts["a._output_0"])
    assert torch.equal(masks["b.weight"].flatten(), acts["a._output_0"])
    assert torch.equal(acts["free._output_0"], masks["free.weight"].flatten()) and not acts["free._output_0"].all()
    rows = masks["stem.weight"].any((1, 2, 3)).view(2, 4).any(1).repeat_interleave(4 * 16)
    assert torch.equal(acts["a._input_0"], rows)


def test_refusals():
    align = {"module_name": "a", "target_name": "_output_0", "dims": [0]}
    assert "dimension 0 of a._output_0 holds the samples" in refuse(on("a"), on("bn_a", "_input_0", align=align))
    align = {"module_name": "a", "target_name": "_output_1", "dims": [1]}
    said = refuse(on("a"), on("bn_a", "_input_0", align=align))
    assert "bn_a._input_0: pruning.config_list[1].align.target_name='_output_1' is no activation there" in said
    assert "a._output_0: pruning.config_list[0].granularity='out_channel' is for parameters" in refuse(
        on("a", granularity="out_channel")
    )
    assert "is for parameters" in refuse(on("a", granularity="2:4"))
    assert "behind the samples: dimension 1 has size 4, which is no multiple of 3" in refuse(
        on("a", granularity=[3, 2])
    )
    assert "l1_norm scores by" in refuse(on("a"), schedule={"name": "one_shot"})


def sharded(shard):
    """Masks of activations after two steps of a model that is sharded, or not, once they are attached."""
    from torch.distributed.fsdp import fully_shard

    entries = [
        on("a", sparse_ratio=0.5),
        on("b", "_input_0", granularity=[2, 2, 2], method="l2_norm", sparse_ratio=0.3),
    ]
    pruner, model, _ = start(
        *entries, schedule={"name": "linear", "start": "1steps", "end": "2steps", "num_decisions": 2}
    )
    if shard:
        for module in (model.stem, model.a, model.b, model.head, model):
            fully_shard(module)
    for step in range(2):
        for first in range(0, NUM_MICRO, comm.world_size()):
            micro = first + comm.rank()
            x, y = micro_batch(step, micro)
            nn.functional.cross_entropy(model.train()(x), y).backward()
            pruner.after_backward(step, micro)
        pruner.before_step(step)
        pruner.after_step(step)
    return [mask.flatten() for mask in pruner.activations.on().values()], pruner.history[-1][2]


@pytest.mark.parametrize("size", [2, 3])
def test_on_a_sharded_model(ranks, size):
    masks, mark = ranks(1, sharded, False)[0]
    assert [int((~m).sum()) for m in masks] == [3, 24]  # 24: three of twelve blocks of eight
    for found, other in ranks(size, sharded, True):
        assert all(torch.equal(a, b) for a, b in zip(found, masks, strict=True)) and other == mark


# ---- after a shrink ----


def shrunk(*entries, model=None):
    """A pruner whose model was shrunk, the model, and what the masked model put out."""
    from dist_compress.speedup import apply, apply_to_state, coupling, plan

    model = Net() if model is None else model
    pruner, _, projection = start(*entries, model=model, coupling=coupling(model, (X,)))
    train(pruner, model, projection, range(1))
    projection.project()
    masked = copy.deepcopy(model).eval()
    made = plan(masked, (X,))
    added = pruner.added()
    pruner.detach()
    projection.finish()
    apply(model, made)
    pruner.rebase(lambda tensors: apply_to_state(made, tensors))
    projection.project()
    return pruner, model.eval(), masked(X), made, made.without(added)


@pytest.mark.parametrize(("module", "site"), [("bn_a", "_output_0"), ("b", "_input_0"), ("free", "_output_0")])
def test_channels_that_are_masked_go_and_so_do_their_masks(module, site):
    pruner, model, masked, made, kept = shrunk(on(module, site, sparse_ratio=0.5))
    torch.testing.assert_close(model(X), masked, rtol=1e-5, atol=1e-6)
    width = model.a.out_channels if module != "free" else model.free.out_channels
    assert width == (3 if module != "free" else 5)
    assert pruner.activations.on() == {} and not list(model.named_buffers())[0][0].startswith("pruning")
    assert not any("pruning" in name for name, _ in model.named_buffers())
    assert any("pruning" in name for name in made.keep) and not any("pruning" in name for name in kept.keep)
    from dist_compress.speedup import apply

    apply(Net(), kept).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("module", "site", "folded"),
    [
        ("bn", "_output_0", ["bn.weight", "bn.bias"]),
        ("a", "_output_0", ["a.weight", "a.bias"]),
        ("stem", "_output_0", ["stem.weight"]),
        ("head", "_output_0", ["head.weight", "head.bias"]),
        ("stem", "_input_0", ["stem.weight"]),
        ("head", "_input_0", ["head.weight"]),
    ],
)
def test_what_stays_masked_is_folded_into_weights(module, site, folded):
    pruner, model, masked, _, _ = shrunk(on(module, site, sparse_ratio=0.5))
    torch.testing.assert_close(model(X), masked, rtol=1e-5, atol=1e-6)
    assert pruner.activations.on() == {}
    zero = [name for name in folded if not bool(pruner.frozen[name].all())]
    assert zero == folded
    for name in folded:
        assert not model.get_parameter(name)[~pruner.frozen[name]].any()


@pytest.mark.parametrize(
    "entry", [on("bn", "_input_0", sparse_ratio=0.5), on("bn", granularity="element"), on("depthwise", "_input_0")]
)
def test_what_cannot_be_folded_stays_a_mask_in_the_model(entry):
    pruner, model, masked, _, kept = shrunk(entry)
    torch.testing.assert_close(model(X), masked, rtol=1e-5, atol=1e-6)
    [path] = pruner.activations.on()
    state = pruner.state_dict()
    assert list(state["activations"]) == [path]
    # a resume: shrunk anew by the plan that was saved, then the state
    again, other, *_ = shrunk_by(kept, entry)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(state)
    assert torch.equal(other(X), model(X))
    assert again.history == pruner.history


def shrunk_by(plan, entry):
    from dist_compress.speedup import apply, apply_to_state, coupling

    model = Net(seed=7)
    pruner, _, projection = start(entry, model=model, coupling=coupling(model, (X,)))
    pruner.detach()
    projection.finish()
    apply(model, plan)
    pruner.rebase(lambda tensors: apply_to_state(plan, tensors))
    return pruner, model.eval()
