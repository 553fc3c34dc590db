"""Network slimming: scores are the scales of norms, and the penalty is the subgradient of their sum."""

import pytest
import torch
from pruning_nets import attach, config

from dist_compress.errors import UserError


def slim(names, **keys):
    return attach(config([{"op_names": names}], method="slim", **keys))


def test_the_smallest_scales_go():
    pruner, model, _ = slim(["a"])
    with torch.no_grad():
        model.bn_a.weight.copy_(torch.tensor([3.0, -0.1, 1.0, 0.2, -4.0, 0.3]))
    pruner.after_step(-1)
    assert pruner.removed[0].tolist() == [False, True, False, True, False, True]


def test_the_penalty_is_added_to_the_gradient_until_the_last_decision():
    schedule = {"name": "one_shot", "start": "2steps", "end": "2steps"}
    pruner, model, _ = slim(["a"], options={"penalty": 0.5}, schedule=schedule)
    with torch.no_grad():
        model.bn_a.weight.copy_(torch.tensor([3.0, -0.1, 0.0, 0.2, -4.0, 0.3]))
    added = [0.5, -0.5, 0.0, 0.5, -0.5, 0.5]
    for step, expected in ((0, added), (1, added), (2, [0.0] * 6)):
        model.bn_a.weight.grad, model.bn.weight.grad = torch.zeros(6), torch.zeros(8)
        pruner.before_step(step)
        assert model.bn_a.weight.grad.tolist() == expected and not model.bn.weight.grad.any()


def test_units_without_a_norm_are_refused():
    with pytest.raises(UserError, match="none follows free"):
        slim(["free"])
