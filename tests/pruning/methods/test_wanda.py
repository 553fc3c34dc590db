"""Wanda against scores taken weight by weight in float64, within rows and patterns, for every kind of layer."""

import itertools

import pytest
import torch
from pruning_nets import NUM_MICRO, Net, attach, config, means_of, micro_batch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.target import Coupling

ONE_STEP = {"name": "one_shot", "end": "1steps"}


class Alone(nn.Module):
    """One layer called as often as it is told."""

    def __init__(self, layer: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.layer(x * (i + 1)) for i in range(self.calls))


def heard(model, inputs, entry=None, **keys):
    """The pruner of `layer` after one step whose micro-batches are `inputs`."""
    entries = [{"op_names": ["layer"], **(entry or {})}]
    pruner, _, _ = attach(config(entries, method="wanda", schedule=ONE_STEP, **keys), model, Coupling())
    for micro in range(NUM_MICRO):
        with torch.no_grad():
            model(100 * torch.ones_like(inputs[micro]))  # an evaluation is not heard
        model(inputs[micro]).sum().backward()
        pruner.after_backward(0, micro)
    return pruner


def mask_of(pruner, model):
    pruner.before_step(0)
    pruner.after_step(0)
    return pruner.masks()["layer.weight"].expand(model.layer.weight.shape)


def test_by_hand():
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.4, -0.3, 0.2, 0.1]]))
    inputs = [torch.zeros(1, 4) for _ in range(NUM_MICRO)]
    inputs[0], inputs[5] = torch.tensor([[1.0, 3.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 6.0, -12.0]])
    # norms 1, 5, 6, 12; scores 4, 15, 12, 12 and a tenth of these: by rows the first goes, not half of the second row
    model = Alone(layer)
    assert mask_of(heard(model, inputs, {"sparse_ratio": 0.25}), model).tolist() == [[False, True, True, True]] * 2
    pruner = heard(model, inputs)
    [tensor] = pruner.elements.tensors()
    pruner._placed()
    data = pruner.block_data
    [norms] = data.heard(["layer"], data.inputs.statistic.total())[tensor.name]
    scores = pruner.scorers["layer"].block_scores(layer.weight.detach().view(-1, 1), norms)
    ratio = scores / scores[0]
    assert ratio.tolist() == pytest.approx([1, 15 / 4, 3, 3, 0.1, 0.375, 0.3, 0.3], rel=1e-6)
    whole = mask_of(heard(model, inputs, {"sparse_threshold": 1.0, "max_sparse_ratio": 0.5}), model)
    assert whole.tolist() == [
        [True] * 4,
        [False] * 4,
    ]  # a threshold compares in all: here the scores are 1.6, 6.1, 4.9, 4.9, 0.16, ..


def rows_by_hand(layer, inputs):
    """Scores [outputs, weights of an output], input channel fastest, one output and one patch at a time."""
    if isinstance(layer, Conv1D):
        return layer.weight.T.abs().double() * torch.cat(inputs).double().square().sum((0, 1)).sqrt()
    if isinstance(layer, nn.Linear):
        return layer.weight.abs().double() * torch.cat(inputs).double().square().sum((0, 1)).sqrt()
    rows, per_group = [], layer.out_channels // layer.groups
    for o in range(layer.out_channels):
        group = o // per_group
        of = slice(group * layer.in_channels // layer.groups, (group + 1) * layer.in_channels // layer.groups)
        patches = F.unfold(
            torch.cat(inputs).double()[:, of], layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )  # [samples, channels * places of the kernel, positions]
        norm = patches.square().sum((0, 2)).sqrt().view(layer.weight[o].shape)
        rows.append((layer.weight[o].abs().double() * norm).movedim(0, -1).flatten())
    return torch.stack(rows)


LAYERS = [
    (nn.Linear(8, 6), (3, 5, 8)),
    (Conv1D(6, 8), (3, 5, 8)),
    (nn.Conv2d(8, 6, 3, stride=2, padding=1), (3, 8, 7, 7)),
    (nn.Conv2d(16, 6, (1, 2), dilation=2, groups=2), (3, 16, 5, 5)),
    (nn.Conv2d(8, 8, 3, groups=8, bias=False), (3, 8, 5, 5)),
]
CASES = [(*layer, granularity) for layer, granularity in itertools.product(LAYERS, ("default", "2:4", "4:8"))][:-2]


@pytest.mark.parametrize(("layer", "shape", "granularity"), CASES, ids=lambda x: str(x))
def test_the_mask_of_scores_one_by_one(layer, shape, granularity):
    torch.manual_seed(1)
    inputs = [torch.randn(shape) * torch.rand(shape[1:]) for _ in range(NUM_MICRO)]
    model = Alone(layer)
    mask = mask_of(heard(model, inputs, {"granularity": granularity, "sparse_ratio": None}, sparse_ratio=0.4), model)
    scores = rows_by_hand(layer, inputs)
    rows = mask.T if isinstance(layer, Conv1D) else mask.movedim(1, -1).flatten(1)
    size, count = (scores.shape[1], int(0.4 * scores.shape[1]))
    if granularity != "default":
        keep, size = map(int, granularity.split(":"))
        count = size - keep
    runs = scores.reshape(-1, size)
    want = torch.ones_like(runs, dtype=torch.bool).scatter_(1, runs.argsort(1)[:, :count], False)
    assert torch.equal(rows.reshape(-1, size), want) and count > 0


def test_a_layer_that_is_called_twice_hears_both_and_groups_compare_layers():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4) for _ in range(NUM_MICRO)]
    layer = nn.Linear(4, 3)
    once, twice = (means_of(heard(Alone(layer, calls), inputs).block_data.inputs)["layer"] for calls in (1, 2))
    torch.testing.assert_close(twice, 5 * once)  # of x and of 2 x
    model = Alone(layer)
    whole = mask_of(heard(model, inputs, {"global_group_id": 1}), model)
    scores = rows_by_hand(layer, [x[:, None] for x in inputs]).flatten()
    assert torch.equal(whole.flatten(), torch.ones(12, dtype=torch.bool).scatter_(0, scores.argsort()[:6], False))


def statistic_of(method_of_reduction):
    """Norms of the inputs of a layer that rank r hears of its own micro-batches, reduced rightly or wrongly."""
    squares = torch.zeros(64, dtype=torch.float64)
    for micro in range(comm.rank(), NUM_MICRO, comm.world_size()):
        generator = torch.Generator().manual_seed(micro)
        spread = torch.rand(64, generator=generator) ** 4
        squares += (torch.randn(32, 64, generator=generator) * spread).double().square().sum(0)
    if method_of_reduction == "root first":
        return comm.all_reduce(squares.sqrt())
    return comm.all_reduce(squares).sqrt()


def test_negative_control_roots_before_the_sum_change_the_mask(ranks):
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).abs().double()

    def masks(how, size):
        return (weight * ranks(size, statistic_of, how)[0]).argsort(1)[:, :32].sort(1)[0]

    right = masks("sum first", 1)
    assert torch.equal(masks("sum first", 3), right) and torch.equal(masks("root first", 1), right)
    wrong = masks("root first", 3)
    changed = sum(len(set(a.tolist()) - set(b.tolist())) for a, b in zip(wrong, right, strict=True))
    assert changed > 0.01 * right.numel()


def test_what_has_no_inputs_is_refused():
    keys = {"method": "wanda", "schedule": ONE_STEP}
    for layer, target in (
        (nn.Embedding(4, 6), "weight"),
        (nn.ConvTranspose2d(2, 4, 3), "weight"),
        (nn.Linear(4, 4), "bias"),
    ):
        entries = [{"op_names": ["layer"], "target_names": [target]}]
        with pytest.raises(UserError, match=f"wanda' scores by the inputs of a layer.* but this is the {target} of a"):
            attach(config(entries, **keys), Alone(layer), Coupling())
    with pytest.raises(UserError, match="'out_channel' needs `unit_scores` of method 'wanda'"):
        attach(config([{"op_names": ["a"], "granularity": "out_channel"}], **keys))
    model = Alone(nn.Linear(4, 4), calls=0)
    model.forward = lambda x: model.layer.weight.sum() * x
    with pytest.raises(UserError, match="layer: pruning method wanda scores .* the model does not call it"):
        mask_of(heard(model, [torch.ones(1, 4)] * NUM_MICRO), model)


def test_only_steps_that_count_are_heard():
    schedule = {"name": "linear", "start": "3steps", "end": "4steps", "num_decisions": 2}
    model = Net()
    pruner, _, _ = attach(config([{"op_names": ["a"]}], method="wanda", schedule=schedule), model)
    calls = []
    inputs = pruner.block_data.inputs
    add = inputs.metrics["a"].input_statistic
    inputs.metrics["a"].input_statistic = lambda x: calls.append(1) or add(x)
    for step in range(5):
        before = len(calls)
        model(micro_batch(step, 0)[0]).sum().backward()
        assert (len(calls) > before) == (step in (2, 3))
        pruner.after_backward(step, 0)
        pruner.before_step(step)
        pruner.after_step(step)
