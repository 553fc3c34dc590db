"""Masks of activations: how many are decided, also on shards, and what is left of them after a shrink."""

from __future__ import annotations

import copy

import pytest
import torch
from activation_nets import SOON, X, on, refuse, start
from pruning_nets import NUM_MICRO, Net, micro_batch, train
from torch import nn

from dist_compress import comm

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
    pruner.reattach()
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
    zero = [name for name in folded if not bool(pruner.frozen.masks[name].all())]
    assert zero == folded
    for name in folded:
        assert not model.get_parameter(name)[~pruner.frozen.masks[name]].any()


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
    pruner.reattach()
    return pruner, model.eval()
