"""The pruner over a training run: equal masks at 1 to 4 ranks, resume, sticky masks, detach and shrink."""

import json

import pytest
import torch
from pruning_nets import NUM_MICRO, Net, attach, config, means_of, micro_batch, train

from dist_compress import comm, pruning
from dist_compress.config import load
from dist_compress.errors import UserError
from dist_compress.pruning.mask import fingerprint

GLOBAL = [{"op_types": ["Conv2d"], "global_group_id": "all"}]
MIXED = [
    {"op_names": ["stem", "b"], "method": "l2_norm"},
    {"op_names": ["a"], "sparse_ratio": 0.3, "method": "taylor"},
    {"op_names": ["free", "head"], "granularity": "element", "global_group_id": 1, "method": "taylor"},
    {"op_names": ["depthwise"], "granularity": "element", "method": "l1_norm"},
]
LISTENING = [
    {"op_names": ["stem", "b"]},
    {"op_names": ["a"], "method": "mean_activation"},
    {"op_names": ["free"], "method": "taylor"},
]
DATA_FREE = [
    {"op_names": ["stem", "b", "a"]},
    {"op_names": ["free"], "method": "random"},
    {"op_names": ["head"], "method": "random", "granularity": "element"},
]
AGP = {"name": "agp", "start": "1steps", "end": "7steps", "num_decisions": 4}


def pruned(entries, method, schedule=AGP, steps=8, **keys):
    """History and final weights of a run. On any number of ranks."""
    cfg = config(entries, method=method, schedule=schedule, **keys)
    pruner, model, projection = attach(cfg, total_steps=steps)
    train(pruner, model, projection, range(steps))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return pruner.history, weights


@pytest.mark.parametrize(
    ("entries", "method", "compute"),
    [
        (GLOBAL, "l1_norm", "macs"),
        (GLOBAL, "l2_norm", "params"),
        (GLOBAL, "taylor", "macs"),
        (MIXED, "taylor", "macs"),
        (GLOBAL, "group_fisher", "macs"),
        (LISTENING, "apoz", "channels"),
        (DATA_FREE, "fpgm", "channels"),
    ],
)
def test_every_decision_is_the_same_at_any_number_of_ranks(ranks, entries, method, compute):
    history, weights = ranks(1, pruned, entries, method, AGP, 8)[0]
    assert [t for t, *_ in history] == [1, 3, 5, 7] and len({mark for *_, mark in history}) > 1
    for size in (2, 3, 4):
        for other, final in ranks(size, pruned, entries, method, AGP, 8):
            assert other == history and torch.equal(final, weights)


def local_only(entries):
    """The reduction of the statistic taken out: each rank believes its own micro-batches."""
    original = comm.ordered_sum
    comm.ordered_sum = lambda rows, num_rows, initial=None: (
        rows[: len(range(comm.rank(), num_rows, comm.world_size()))].double().sum(0)
    )
    try:
        pruner, model, _ = attach(config(entries, method="taylor", schedule=AGP), total_steps=8)
        for micro in range(comm.rank(), NUM_MICRO, comm.world_size()):
            x, y = micro_batch(0, micro)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            pruner.after_backward(0, micro)
        means = means_of(pruner.listeners["gates"])
    finally:
        comm.ordered_sum = original
    return torch.cat(means)


def test_negative_control_without_the_reduction_the_statistics_differ(ranks):
    one = ranks(1, local_only, GLOBAL)[0]
    a, b = ranks(2, local_only, GLOBAL)
    assert not torch.equal(a, one) and not torch.equal(a, b)
    assert not torch.equal(a.argsort()[: len(a) // 2].sort()[0], one.argsort()[: len(a) // 2].sort()[0])


@pytest.mark.parametrize(("decisions", "heard"), [(1, 2), (2, 3), (3, 2)])  # an epoch is 2 steps; from step 4 to 7
def test_a_decision_does_not_hear_the_beginning_of_the_run(decisions, heard):
    name = "one_shot" if decisions == 1 else "linear"
    schedule = {"name": name, "start": "4steps", "end": "7steps", "num_decisions": decisions}
    pruner, model, projection = attach(config(GLOBAL, method="taylor", schedule=schedule), total_steps=8)
    first = min(pruner.schedule)
    train(pruner, model, projection, range(first - 1))
    assert pruner.listeners["gates"].statistic.count() == heard - 1  # one more in the step of the decision


def test_negative_control_abs_before_the_sum_changes_the_mask():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20_000, generator=generator)
    grads = torch.randn(4, 20_000, generator=generator)  # of 4 ranks
    right = (grads.sum(0) * weight).abs().argsort()[:10_000]
    wrong = (grads.abs().sum(0) * weight.abs()).argsort()[:10_000]
    changed = 10_000 - len(set(right.tolist()) & set(wrong.tolist()))
    assert changed > 1_000  # more than 10 % of the mask


def drifted(entries):
    """Rank 1's replica is off by an ulp: the masks are one owner's decision all the same."""
    pruner, model, projection = attach(config(entries))
    if comm.rank() == 1:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    pruner.after_step(-1)
    return pruner.history


def test_drifted_replicas_still_agree(ranks):
    elements = [{"op_types": ["Conv2d"], "granularity": "element", "global_group_id": 0}]
    for entries in (GLOBAL, elements):
        a, b = ranks(2, drifted, entries)
        assert a == b


def corrupted():
    pruner, _, _ = attach(config(GLOBAL))
    masks = pruner._target_masks
    if comm.rank() == 1:
        pruner._target_masks = lambda: {k: m.logical_not() if k == "a.bias" else m for k, m in masks().items()}
    try:
        pruner.after_step(-1)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_corrupt_mask_stops_every_rank(ranks):
    for said in ranks(2, corrupted):
        assert "disagree on pruning masks at step 0" in said


def resumed(entries, steps, at):
    """Killed after `at` steps and started again: model, optimizer and pruner from the saved state."""
    cfg = config(entries, method="taylor", schedule=AGP)
    pruner, model, projection = attach(cfg, total_steps=steps)
    train(pruner, model, projection, range(at))
    with projection.lifted():
        weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = pruner.state_dict()
    again, model, projection = attach(cfg, Net(seed=9), total_steps=steps)
    assert again.state_dict().keys() == state.keys()
    model.load_state_dict(weights)
    again.load_state_dict(state)
    projection.project()
    train(again, model, projection, range(at, steps))
    return again.history


def test_a_state_from_any_rank_count_resumes_to_the_same_masks(ranks):
    for at in (2, 5):
        found = {json.dumps(h) for n in (1, 2, 3) for h in ranks(n, resumed, MIXED, 8, at)}
        assert len(found) == 1


def saved(entries, at):
    pruner, model, projection = attach(config(entries, method="taylor", schedule=AGP), total_steps=8)
    train(pruner, model, projection, range(at))
    with projection.lifted():
        return {k: v.clone() for k, v in model.state_dict().items()}, pruner.state_dict()


def continued(entries, weights, state, at):
    pruner, model, projection = attach(config(entries, method="taylor", schedule=AGP), Net(5), total_steps=8)
    model.load_state_dict(weights)
    pruner.load_state_dict(state)
    projection.project()
    train(pruner, model, projection, range(at, 8))
    return pruner.history


def test_saved_on_two_ranks_continues_on_one_three_and_four(ranks):
    weights, state = ranks(2, saved, MIXED, 4)[0]
    want = ranks(2, continued, MIXED, weights, state, 4)[0]
    assert len(want) == 4
    for size in (1, 3, 4):
        assert ranks(size, continued, MIXED, weights, state, 4) == [want] * size


def test_state_of_other_targets_is_refused():
    pruner, _, _ = attach(config(GLOBAL))
    state = pruner.state_dict()
    for entries in ([{"op_names": ["a"]}], [*GLOBAL, {"op_names": ["head"], "granularity": "element"}]):
        with pytest.raises(UserError, match="another pruning.config_list"):
            attach(config(entries))[0].load_state_dict(state)
    pruner.after_step(-1)
    state = pruner.state_dict()
    state["units"] = state["units"].logical_not()
    with pytest.raises(RuntimeError, match="do not have its fingerprint"):
        attach(config(GLOBAL))[0].load_state_dict(state)


def test_what_is_removed_stays_removed_and_the_ratio_is_reached():
    linear = {"name": "linear", "start": 0.0, "end": 0.75, "num_decisions": 4}
    pruner, model, projection = attach(config([{"op_types": ["Conv2d"]}], schedule=linear), total_steps=4)
    before = [gone.clone() for gone in pruner.removed]
    counts = []
    for step in range(-1, 3):
        if step >= 0:
            train(pruner, model, projection, range(step + 10, step + 11))
            with torch.no_grad(), projection.lifted():
                model.free.weight.copy_(model.free.weight.flip(0))  # the ranking changes altogether
        pruner.after_step(step)
        projection.restore()
        projection.project()
        assert all(gone[old].all() for gone, old in zip(pruner.removed, before, strict=True))
        before = [gone.clone() for gone in pruner.removed]
        counts.append([int(gone.sum()) for gone in pruner.removed])
    assert counts[-1] == [4, 3, 5]  # floor(n / 2) of 8, 6, 10
    assert counts[0] == [1, 0, 1] and counts[1] == [2, 1, 2]


def test_a_run_of_four_steps_reaches_the_target():
    schedule = {"name": "agp", "start": 0.1, "end": 0.6, "num_decisions": 10}
    history, _ = pruned([{"op_types": ["Conv2d"]}], "taylor", schedule, steps=4)
    assert history[-1][1] == 0.5


def test_masked_weights_and_their_momentum_die_but_the_latent_lives():
    pruner, model, projection = attach(config([{"op_names": ["free"]}]))
    train(pruner, model, projection, range(1))
    gone = pruner.removed[0]
    assert not model.free.weight[gone].any() and projection.latent("free.weight")[gone].all()
    assert not model.free.weight.grad[gone].any() and model.free.weight.grad[~gone].any()


def test_detach_leaves_zeros_and_rebase_keeps_them_after_a_shrink():
    entries = [{"op_names": ["a"]}, {"op_names": ["free"], "granularity": "element", "sparse_ratio": 0.4}]
    pruner, model, projection = attach(config(entries))
    pruner.after_step(-1)
    projection.project()
    masks = {k: m.expand(model.get_parameter(k).shape).clone() for k, m in pruner.masks().items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pruner.detach()
    projection.restore()
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert not parameter[~mask].any() and torch.equal(parameter, state[name])
    model.free.weight.data = model.free.weight.data[:7]  # what a shrink does
    pruner.rebase(lambda tensors: {k: v[:7] if k == "free.weight" else v for k, v in tensors.items()})
    pruner.reattach()
    with torch.no_grad():
        model.free.weight.fill_(1.0)
    projection.project()
    assert torch.equal(model.free.weight != 0, masks["free.weight"][:7])
    pruner.after_step(-1)  # no decision follows
    saved_state = pruner.state_dict()
    assert set(saved_state) == {"masks", "activations", "history", "scores"}
    pruner.load_state_dict(saved_state)
    assert int(str(fingerprint(projection.layout, pruner.masks())), 16)


def test_results_and_metrics():
    pruner, _, _ = attach(config([{"op_types": ["Conv2d", "Linear"]}], sparse_ratio=0.4))
    assert pruner.metrics() == {"pruning/sparse_ratio": 0.0}
    pruner.after_step(-1)
    results = pruner.results()
    assert json.loads(json.dumps(results)) == results
    assert results["asked_but_kept"] == [
        {"name": "head", "asked": 0.4, "given": 0.0, "reason": "is an output of the model"}
    ]
    rows = {row["name"]: (row["given"], row["reason"]) for row in results["groups"]}
    assert rows["stem + b + depthwise"] == (3 / 8, "whole channels only") and rows["free"] == (0.4, "")
    mark = results["fingerprint/masks"]
    assert results["decisions"] == [{"step": 0, "ratio": 9 / 24, "fingerprint": mark}]
    assert pruner.metrics() == {
        "pruning/sparse_ratio": 9 / 24,
        "fingerprint/masks": float(int(mark, 16) % 2**52),
    }


def test_build():
    assert pruning.build(load({})) == []
    entry = {"op_types": ["Conv2d"], "method": "l1_norm", "sparse_ratio": 0.5}
    assert len(pruning.build(load({"pruning": {"config_list": [entry]}}))) == 1


def collectives(entries):
    pruner, model, projection = attach(config(entries, method="taylor", schedule={"name": "one_shot", "end": "1steps"}))
    pruner.before_step(0)
    comm.calls.clear()
    pruner.after_step(0)
    return dict(comm.calls)


def test_a_decision_costs_a_fixed_number_of_collectives(ranks):
    units, mixed = ranks(2, collectives, GLOBAL)[0], ranks(2, collectives, MIXED)[0]
    assert units == {"ordered_sum": 1, "all_gather": 1, "all_reduce": 2}  # what was heard, scores, fingerprints
    assert mixed.pop("all_gather") <= 2  # the second for what ties
    assert mixed == {"ordered_sum": 1, "all_reduce": 3 + 1, "all_to_all": 1}
