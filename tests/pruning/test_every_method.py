"""Every file of pruning/methods, by itself: equal masks and weights at 1, 2, 3 and 4 ranks, and across a resume."""

import pkgutil

import pytest
import torch
from pruning_nets import NUM_MICRO, Net, attach, config, train

from dist_compress.pruning import methods
from dist_compress.pruning.metric import build_metric

METHODS = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
SCHEDULE = {"name": "linear", "start": "2steps", "end": "4steps", "num_decisions": 2}
STEPS = 5
OPTIONS = {"rigl": {"every": 1, "until": 1.0}}  # where the usual ones are for long runs


def entries(method):
    """What the method can score: coupled channels, channels of a bare layer, single weights, patterns, activations."""
    metric = build_metric(method, OPTIONS.get(method, {}), "pruning")
    found = []
    if not metric.missing(blocks=False):
        found += [{"op_names": ["stem", "b"]}, {"op_names": ["a"]}] if method == "slim" else [{"op_types": ["Conv2d"]}]
        found = [{**entry, "granularity": "out_channel"} for entry in found]
    if not metric.missing(blocks=True):
        found.append({"op_names": ["a", "head"], "granularity": "element"})
        kind = {"granularity": "element"} if metric.regrows else {"granularity": "2:4", "sparse_ratio": None}
        found.append({"op_names": ["free"], **kind})
    if metric.hears_activations():
        found.append({"op_names": ["bn_a"], "target_names": ["_output_0"], "granularity": "per_channel"})
        found.append({"op_names": ["a"], "target_names": ["_input_0"], "granularity": [4, 2, 2]})
    return found


def run(method, stop=None, state=None):
    """(history, masks and weights after it, state) of steps up to `stop`, going on from `state`."""
    cfg = config(entries(method), method=method, options=OPTIONS.get(method, {}), schedule=SCHEDULE)
    pruner, model, projection = attach(cfg, Net(seed=9 if state else 0), total_steps=STEPS)
    if state:
        model.load_state_dict(state[0])
        pruner.load_state_dict(state[1])
        projection.project()
    train(pruner, model, projection, range(state[2] if state else 0, stop or STEPS))
    kept = [mask.expand(model.get_parameter(name).shape).flatten() for name, mask in sorted(pruner.masks().items())]
    kept += [mask.flatten() for _, mask in sorted(pruner.activations.on().items())]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    with projection.lifted():
        latent = {key: value.clone() for key, value in model.state_dict().items()}
    return pruner.history, torch.cat(kept), weights, (latent, pruner.state_dict(), stop)


@pytest.mark.parametrize("method", METHODS)
def test_decides_the_same_at_any_number_of_ranks_and_after_a_resume_at_another(ranks, method):
    assert NUM_MICRO % 4  # at 4 ranks some have no micro-batch in the last round
    history, masks, weights, _ = ranks(1, run, method)[0]
    assert [t for t, *_ in history][:2] == [2, 4] and not masks.all() and len({mark for *_, mark in history}) > 1
    for size in (2, 3, 4):
        for found in ranks(size, run, method):
            assert found[0] == history and torch.equal(found[1], masks) and torch.equal(found[2], weights)
    for before, after in ((3, 1), (2, 4)):
        state = ranks(before, run, method, 3)[0][3]
        assert ranks(after, run, method, None, state)[0][0][-1] == ranks(before, run, method, None, state)[0][0][-1]
