"""Every file of pruning/methods, by itself: equal masks and weights at 1, 2, 3 and 4 ranks, and across a resume."""

import pytest
import torch
from pruning_methods import METHODS, OPTIONS, entries
from pruning_nets import NUM_MICRO, Net, attach, config, train

SCHEDULE = {"name": "linear", "start": "2steps", "end": "4steps", "num_decisions": 2}
STEPS = 5


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
