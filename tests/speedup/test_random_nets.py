"""Random small models with random masks: masked equals shrunk, and what was masked and could go is gone.

A failure names its seed: `random_nets.check(seed)` replays it, `random_nets.describe(seed)` prints the model.
"""

from collections import Counter

import pytest
import torch
from random_nets import Broken, check, check_chain
from torch import nn

from dist_compress import speedup
from dist_compress.speedup import Plan, contraction, dimwise, planning

EACH = 50


@pytest.mark.filterwarnings("ignore:.*num_features.*")
@pytest.mark.parametrize("first", range(0, 500, EACH))
def test_masked_equals_shrunk(first):
    outcomes = [check(seed) for seed in range(first, first + EACH)]
    shrunk = Counter(o.style for o in outcomes if o.after < o.before)
    drawn = Counter(o.style for o in outcomes)
    assert shrunk["groups"] >= 0.6 * drawn["groups"], "planning that keeps everything would pass"
    assert shrunk["slices"] >= 0.4 * drawn["slices"]
    assert shrunk["none"] <= 0.2 * drawn["none"], "something vanished that nobody masked"


def test_a_chain_loses_exactly_what_is_masked():
    assert sum(check_chain(seed) for seed in range(60)) > 200


BROKEN_RULES = {
    "normalised dims may go": (dimwise.LayerNorm, "special", lambda self, op, num_dims: set()),
    "groups of a norm may go in part": (dimwise.GroupNorm, "link", dimwise.BatchNorm.link),
    "softmax may lose positions": (dimwise.Softmax, "link_special", lambda self, var, d, op, s: None),
    "matmul taints nothing": (
        contraction.Matmul,
        "taint",
        lambda self, op, f: [torch.zeros((1,) * len(f.shape(op.out)), dtype=torch.bool)],
    ),
    "convolutions see nothing": (contraction.Convolution, "live", lambda self, op, f, seen: ()),
}


def failures(seeds):
    for seed in seeds:
        try:
            check(seed)
        except Broken as error:
            yield str(error)


@pytest.mark.parametrize("name", BROKEN_RULES)
def test_a_broken_rule_is_found(name, monkeypatch):
    """With nothing to catch it on the way; among a few models there is one on which it shows."""
    owner, method, wrong = BROKEN_RULES[name]
    monkeypatch.setattr(owner, method, wrong)
    monkeypatch.setattr(planning, "rehearse", lambda *args, **kwargs: None)
    assert next(failures(range(60)), None) is not None


def test_a_plan_that_keeps_everything_is_found(monkeypatch):
    monkeypatch.setattr(speedup, "plan", lambda *args, **kwargs: Plan())
    assert "keeps" in next(failures(range(20)))
    with pytest.raises(AssertionError, match="keeps"):
        check_chain(0)


def test_a_rehearsal_saves_a_plan_by_a_broken_rule(monkeypatch):
    """Normalised dims that a wrong rule lets go come back, with the module that needs them as the reason."""
    monkeypatch.setattr(dimwise.LayerNorm, "special", lambda self, op, num_dims: set())
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0
    plan = speedup.plan(model, (torch.randn(2, 4).double(),))
    assert "0.weight" not in plan.keep
