"""Decisions on sharded parameters are those on whole ones, bit for bit: every method, FSDP2 and flat partitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning_methods import METHODS, OPTIONS, entries
from pruning_nets import NUM_MICRO, Net, attach, config, micro_batch, train
from sharded_nets import Flat, listen, set_gradient, shard, whole
from torch import nn

from dist_compress import comm
from dist_compress.projection import Projection
from dist_compress.pruning.pruner import Pruner

SCHEDULE = {"name": "linear", "start": "1steps", "end": "3steps", "num_decisions": 2}
STEPS = 4


def start(entries: Any, kind: str, steps: int = STEPS, **keys: Any) -> tuple[Pruner, nn.Module, Projection]:
    """Attached to a whole model, which is sharded afterwards, as a run does it."""
    pruner, model, projection = attach(config(entries, **keys), total_steps=steps)
    projection.layout = shard(model, kind)
    return pruner, model, projection


def train_sharded(pruner: Pruner, model: nn.Module, projection: Projection, steps: range) -> None:
    """As `pruning_nets.train`, on parts: the passes are the backend's, but gradients, heard of each micro-batch before
    they are reduced, are summed in the order of micro-batches."""
    layout, grads = projection.layout, listen(model)
    sizes = {name: layout.shape(name).numel() for name, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    if steps.start == 0:
        pruner.after_step(-1)
        projection.project()
    for step in steps:
        rows = []
        for micro in range(comm.rank(), -(-NUM_MICRO // comm.world_size()) * comm.world_size(), comm.world_size()):
            x, y = micro_batch(step, micro if micro < NUM_MICRO else 0)
            if isinstance(layout, Flat):
                layout.gather()
            (nn.functional.cross_entropy(model(x), y, reduction="sum") / (4 * NUM_MICRO)).backward()
            if isinstance(layout, Flat):
                layout.release()
            rows.append(torch.cat([grads[name].flatten() for name in sizes]))
            if micro < NUM_MICRO:
                pruner.after_backward(step, micro)
        total = comm.ordered_sum(torch.stack(rows), NUM_MICRO).float()
        for name, grad in zip(sizes, total.split(list(sizes.values())), strict=True):
            set_gradient(layout, name, grad.view(layout.shape(name)))
        pruner.before_step(step)
        projection.edit_gradients()
        projection.restore()
        optimizer.step()
        pruner.after_step(step)
        projection.project()


def run(kind: str, entries: Any, keys: dict[str, Any], steps: int = STEPS) -> tuple[Any, ...]:
    pruner, model, projection = start(entries, kind, steps, **keys)
    (train if kind == "whole" else train_sharded)(pruner, model, projection, range(steps))
    weights = torch.cat([whole(projection.layout, name).flatten() for name, _ in Net().named_parameters()])
    results = pruner.results()
    told = {key: results[key] for key in ("groups", "targets", "kept_channels", "decisions")}
    return pruner.history, weights, told, pruner.state_dict()["elements"]


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    bits = a[3].keys() == b[3].keys() and all(torch.equal(a[3][name], b[3][name]) for name in a[3])
    return a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] and bits


@pytest.mark.parametrize(("kind", "sizes"), [("fsdp", (2, 4)), ("flat", (3,))])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_decides_as_on_whole_parameters(ranks, method, kind, sizes):
    keys = {"method": method, "options": OPTIONS.get(method, {}), "schedule": SCHEDULE}
    expected = ranks(1, run, "whole", entries(method), keys, 3)[0]
    assert len({mark for *_, mark in expected[0]}) > 1
    for size in sizes:
        for found in ranks(size, run, kind, entries(method), keys, 3):
            assert same(found, expected), (size, found[0], expected[0])


FOLLOW = {"align": {"module_name": "a", "target_name": "weight", "dims": [0]}}
THEN = {"align": {"module_name": "bn_a", "target_name": "weight", "dims": [0]}}
MIXED = [  # a coupled set; rows, columns, tiles, a pattern and a threshold; a global group; what follows what follows
    {"op_names": ["stem", "b"], "method": "fpgm"},
    {"op_names": ["a"], "granularity": [2, -1, -1, -1], "method": "l2_norm"},
    {"op_names": ["bn_a"], "target_names": ["weight"], **FOLLOW},
    {"op_names": ["bn_a"], "target_names": ["bias"], **THEN},
    {"op_names": ["depthwise"], "granularity": "element", "sparse_threshold": 0.1, "method": "l1_norm"},
    {"op_names": ["free"], "granularity": "1:4", "method": "taylor", "sparse_ratio": None},
    {"op_names": ["head"], "granularity": [-1, 4], "global_group_id": 1, "method": "taylor", "max_sparse_ratio": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["fsdp", "flat", "hsdp"])
def test_all_granularities_with_what_follows_them(ranks, kind):
    keys = {"schedule": SCHEDULE}
    expected = ranks(1, run, "whole", MIXED, keys, 3)[0]
    assert len({mark for *_, mark in expected[0]}) > 1 and len(expected[2]["groups"]) == 5
    for size in {"fsdp": (2, 3, 4), "flat": (1, 2, 3, 4), "hsdp": (4,)}[kind]:
        for found in ranks(size, run, kind, MIXED, keys, 3):
            assert same(found, expected), (size, found[0], expected[0])


def saved(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    pruner, model, projection = start(MIXED, kind, schedule=SCHEDULE)
    (train if kind == "whole" else train_sharded)(pruner, model, projection, range(2))
    with projection.lifted():
        return {name: whole(projection.layout, name) for name, _ in Net().named_parameters()}, pruner.state_dict()


def resumed(kind: str, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> tuple[Any, ...]:
    pruner, model, projection = attach(config(MIXED, schedule=SCHEDULE), Net(7), total_steps=STEPS)
    model.load_state_dict({**model.state_dict(), **weights})
    projection.layout = shard(model, kind)
    pruner.load_state_dict(state)
    projection.project()
    (train if kind == "whole" else train_sharded)(pruner, model, projection, range(2, STEPS))
    return pruner.history, pruner.state_dict()["elements"]


def test_a_state_of_any_sharding_resumes_at_any_other(ranks):
    plain = ranks(1, saved, "whole")[0]
    expected = ranks(1, resumed, "whole", *plain)[0]
    assert len(expected[0]) == 2
    for before, kind in ((2, "fsdp"), (3, "flat")):
        for weights, state in ranks(before, saved, kind):
            assert all(torch.equal(state["elements"][n], plain[1]["elements"][n]) for n in plain[1]["elements"])
            assert all(torch.equal(weights[n], plain[0][n]) for n in weights)
        for after, other in ((1, "whole"), (4, "fsdp"), (2, "flat")):
            history, bits = ranks(after, resumed, other, weights, state)[0]
            assert history == expected[0] and all(torch.equal(bits[n], expected[1][n]) for n in bits)


def detached(kind: str) -> dict[str, torch.Tensor]:
    pruner, model, projection = start(MIXED, kind, schedule=SCHEDULE)
    (train if kind == "whole" else train_sharded)(pruner, model, projection, range(3))
    projection.restore()
    pruner.detach()
    state = pruner.state_dict()
    before = {name: mask.clone() for name, mask in pruner.masks().items()}
    pruner.load_state_dict(state)
    assert all(torch.equal(before[name], mask) for name, mask in pruner.masks().items())
    return state["masks"]


def test_the_masks_of_a_detached_pruner_are_saved_whole(ranks):
    expected = ranks(1, detached, "whole")[0]
    for kind in ("fsdp", "flat"):
        for masks in ranks(3, detached, kind):
            assert all(torch.equal(masks[name], expected[name]) for name in expected)


def traffic(kind: str, entries: Any) -> tuple[dict[str, int], int, int, int]:
    """Collectives of a decision, weights sent by this rank, weights and bits it has for the decision."""
    pruner, model, projection = start(entries, kind, schedule=SCHEDULE)
    sent = []
    original = comm.all_to_all
    comm.all_to_all = lambda send, receive: (sent.append([len(t) for t in send]), original(send, receive))[1]
    comm.calls.clear()
    try:
        pruner.decide(1)
    finally:
        comm.all_to_all = original
    wants = pruner._placed().gather(pruner.scorers).flat
    bits = sum(len(b) for b in pruner.elements.removed.values())
    moved = sum(sum(sizes) for sizes in sent)
    return dict(comm.calls), moved, sum(len(t) for t in wants.values()), bits


def test_single_weights_stay_where_they_are_and_no_rank_has_them_all(ranks):
    single = [{"op_types": ["Conv2d", "Linear"], "granularity": "element", "global_group_id": 0, "method": "l1_norm"}]
    total = sum(p.numel() for n, p in Net().named_parameters() if p.dim() > 1)
    for kind in ("fsdp", "flat"):
        found = ranks(3, traffic, kind, single)
        for calls, moved, weights, bits in found:
            assert moved == 0 and "all_to_all" not in calls  # neither weights nor decisions travel
            assert weights == bits < (0.5 if kind == "fsdp" else 0.8) * total
        assert sum(weights for _, _, weights, _ in found) == total


def test_collectives_on_shards_do_not_grow_with_the_layers(ranks):
    few = ranks(2, traffic, "fsdp", [{"op_names": ["a"]}, {"op_names": ["free"], "granularity": "1:4"}])[0][0]
    many = ranks(
        2, traffic, "fsdp", [{"op_names": ["stem", "a", "b"]}, {"op_names": ["free", "head"], "granularity": "1:2"}]
    )[0][0]
    assert few == many and sum(few.values()) <= 12
