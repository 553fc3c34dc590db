"""SR-STE: the gradient of its formula, N:M after every step, masks that return, equal at any number of ranks."""

import json

import pytest
import torch
from pruning_nets import Net, attach, config, train
from torch import nn
from torch.nn import functional as F

from dist_compress.errors import UserError

ENTRY = {"op_names": ["a", "free"], "method": "sr_ste"}
MIXED = [ENTRY, {"op_names": ["head"], "granularity": "element", "method": "l1_norm", "sparse_ratio": 0.3}]
SOON = {"name": "one_shot", "start": "1steps", "end": "1steps"}


class Formula(torch.autograd.Function):
    """What the paper defines: forward mask * w, backward g + decay * (1 - mask) * w."""

    @staticmethod
    def forward(ctx, weight, mask, decay):
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * ~mask * weight, None, None


def best_two(weight: torch.Tensor) -> torch.Tensor:
    """bool, of each four consecutive inputs of a linear layer the two largest."""
    order = weight.abs().view(-1, 4).argsort(1, descending=True)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :2], True).view(weight.shape)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_three_steps_equal_autograd_with_the_formula_of_the_paper(decay):
    torch.manual_seed(0)
    layer, other = nn.Linear(8, 3), nn.Linear(8, 3)
    other.load_state_dict(layer.state_dict())
    options = {"decay": decay}
    cfg = config([{"op_types": ["Linear"]}], method="sr_ste", options=options, sparse_ratio=None)
    pruner, _, projection = attach(cfg, nn.Sequential(layer))
    mine, theirs = (torch.optim.SGD(m.parameters(), 0.3, momentum=0.9) for m in (layer, other))
    pruner.after_step(-1)
    projection.project()
    masks = set()
    for step in range(4):
        x, y = torch.randn(16, 8), torch.randn(16, 3)
        mask = best_two(other.weight.detach())
        masks.add(str(mask.tolist()))
        assert torch.equal(layer.weight != 0, mask)
        theirs.zero_grad()
        F.mse_loss(F.linear(x, Formula.apply(other.weight, mask, decay), other.bias), y).backward()
        theirs.step()
        mine.zero_grad()
        F.mse_loss(layer(x), y).backward()
        pruner.before_step(step)
        projection.edit_gradients()
        torch.testing.assert_close(layer.weight.grad, other.weight.grad, rtol=1e-6, atol=1e-7)
        projection.restore()
        mine.step()
        pruner.after_step(step)
        projection.project()
        torch.testing.assert_close(projection.latent("0.weight"), other.weight.detach(), rtol=1e-6, atol=1e-7)
    assert len(masks) > 1  # weights came back


def fours(weight: torch.Tensor) -> torch.Tensor:
    """Kept weights of each four neighbours along the input dim of a convolution."""
    kept = (weight.detach() != 0).movedim(1, -1).reshape(-1, weight.shape[1])
    return kept[:, : weight.shape[1] // 4 * 4].reshape(-1, 4).sum(1)


def test_two_of_four_hold_after_every_step_and_in_what_is_left():
    pruner, model, projection = attach(config([ENTRY]), total_steps=4)
    masks = []
    for step in range(4):
        train(pruner, model, projection, range(step, step + 1))
        assert set(fours(model.a.weight).tolist()) == set(fours(model.free.weight).tolist()) == {2}
        masks.append(model.a.weight.detach() != 0)
    assert any((later & ~earlier).any() for earlier, later in zip(masks, masks[1:], strict=False))
    assert pruner.change_steps() == [-1, 0, 1, 2, 3] and len(pruner.history) == 2
    latent = projection.latent("a.weight").clone()
    pruner.detach()
    projection.finish()
    assert latent.all() and torch.equal(model.a.weight != 0, masks[-1])
    model.a.weight.grad = torch.ones_like(model.a.weight)
    pruner.rebase(lambda tensors: tensors)
    pruner.reattach()
    projection.edit_gradients()
    assert torch.equal(model.a.weight.grad != 0, masks[-1])  # from here on a mask like any other


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, [1, 2, 3, 4, 5, 6, 7, 8]), ({"every": 3}, [1, 4, 7]), ({"every": 2, "until": "5steps"}, [1, 3, 5])],
)
def test_when_masks_are_decided(options, steps):
    entries = [{**ENTRY, "op_names": ["a"], "options": options}]
    pruner, _, _ = attach(config(entries, schedule=SOON), total_steps=8)
    assert pruner.change_steps() == [t - 1 for t in steps]


def test_between_its_own_updates_the_other_methods_stand_still():
    pruner, model, projection = attach(config([{**ENTRY, "op_names": ["a"]}, MIXED[1], {"op_names": ["free"]}]))
    train(pruner, model, projection, range(1))
    head, units = pruner.elements.removed["head.weight"].clone(), pruner.removed[0].clone()
    with torch.no_grad(), projection.lifted():
        for weight in (model.head.weight, model.free.weight, model.a.weight):
            weight.copy_(weight.flip(0))
    before = pruner.elements.removed["a.weight"].clone()
    train(pruner, model, projection, range(1, 2))
    assert torch.equal(pruner.elements.removed["head.weight"], head) and torch.equal(pruner.removed[0], units)
    assert not torch.equal(pruner.elements.removed["a.weight"], before)
    assert int(pruner.removed[0].sum()) == 5


def run(at: int | None):
    """History and weights of six steps; killed after `at` and started again."""
    entries = [{**ENTRY, "options": {"every": 2, "decay": 0.1}}, MIXED[1]]
    pruner, model, projection = attach(config(entries, schedule=SOON), total_steps=6)
    train(pruner, model, projection, range(at or 6))
    if at is not None:
        with projection.lifted():
            weights = {k: v.clone() for k, v in model.state_dict().items()}
        state = pruner.state_dict()
        pruner, model, projection = attach(config(entries, schedule=SOON), Net(seed=9), total_steps=6)
        model.load_state_dict(weights)
        pruner.load_state_dict(state)
        projection.project()
        train(pruner, model, projection, range(at, 6))
    return json.dumps(pruner.history), torch.cat([p.detach().flatten() for p in model.parameters()])


def test_equal_masks_and_weights_at_any_number_of_ranks(ranks):
    history, weights = ranks(1, run, None)[0]
    for size in (2, 3, 4):
        for other, found in ranks(size, run, None):
            assert other == history and torch.equal(found, weights)


def test_a_killed_run_goes_on_with_the_same_masks(ranks):
    """(Momentum is not kept here, so weights are compared with a run on another number of ranks.)"""
    history, weights = ranks(1, run, 4)[0]
    for other, found in ranks(3, run, 4):
        assert other == history and torch.equal(found, weights)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"granularity": "out_channel"}, "out_channel' needs `unit_scores` of method 'sr_ste'"),
        ({"options": {"decay": -1.0}}, "options.decay=-1.0 must be at least 0"),
        ({"options": {"every": 0}}, "options.every=0 must be at least 1"),
        ({"options": {"until": "soon"}}, "options.until='soon' is no duration"),
        ({"options": {"decya": 1.0}}, "options.decya"),
        ({"sparse_ratio": 0.3}, "sparse_ratio.* contradicts granularity='2:4' by default"),
    ],
)
def test_refused(keys, said):
    with pytest.raises(UserError, match=said):
        attach(config([{**ENTRY, "op_names": ["a"], **keys}]))
