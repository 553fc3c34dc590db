"""Solving as a round of the calibration: equal bits, owners, collectives, every kind of layer, what has no solution."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parent))  # also in the workers of the pool
from block_nets import LINEAR, SIZE, Block, attached, micro, shown  # noqa: E402

from dist_compress import comm  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402
from dist_compress.fingerprint import weights_fingerprint  # noqa: E402
from dist_compress.projection import Masked  # noqa: E402
from dist_compress.quantization import Quantizer  # noqa: E402
from dist_compress.quantization.heard import owners  # noqa: E402


def bits(num_micro: int, drift: bool = False) -> tuple[str, str, dict[str, int]]:
    model = Block()
    if drift and comm.rank() == 1:
        with torch.no_grad():
            model.q.weight.add_(1e-6)
    quantizer = attached(model, num_micro=num_micro, method="gptq", config_list=LINEAR)
    comm.calls.clear()
    shown(quantizer)
    calls = dict(comm.calls)
    quantizer.begin()
    return weights_fingerprint(model), quantizer.fingerprint(), calls


def test_equal_bits_at_any_number_of_ranks(ranks):
    for num_micro, sizes in ((2, (3,)), (5, (2, 3, 4))):  # of 2 micro-batches the third rank has none
        weights, scales, calls = ranks(1, bits, num_micro)[0]
        for n in sizes:
            for other in ranks(n, bits, num_micro):
                assert other == (weights, scales, calls)
    # what 4 inputs of 7 layers sum up to, one by one, and the weights of each layer
    assert calls == {"ordered_sum": 4, "all_gather": 4, "gather_object": 1, "broadcast": 7}


def test_a_layer_is_solved_once_and_handed_out(ranks):
    """Replicas that drifted would solve differently: q is owned by rank 0, or both would not be equal."""
    first, second = ranks(2, bits, 4, True)
    assert first[:2] == second[:2]


def test_owners_share_the_work():
    assert owners({"a": 5.0, "b": 3.0, "c": 9.0}) == {"a": 0, "b": 0, "c": 0}


def shares() -> dict[str, int]:
    return owners({"a": 5.0, "b": 3.0, "c": 9.0, "d": 1.0})


def test_the_most_costly_comes_first(ranks):
    assert ranks(2, shares) == [{"a": 1, "b": 1, "c": 0, "d": 1}] * 2


class Layers(nn.Module):
    """Each kind of layer that has a linear form, on the same input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1d = Conv1D(6, 8)
        self.conv = nn.Conv2d(8, 6, 3, padding=1, stride=2)
        self.groups = nn.Conv2d(8, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.norm.weight.data.uniform_(0.5, 2)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 8, 6, 6]
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        return self.conv1d(tokens).sum() + self.norm(self.conv(x)).sum() + self.groups(x).sum()


def image(step: int, j: int) -> torch.Tensor:
    x = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(100 * step + j))
    return torch.einsum("bchw,cd->bdhw", x, MIX8)


MIX8 = torch.randn(8, 8, generator=torch.Generator().manual_seed(4))


def layers(method: str, granularity: str) -> Quantizer:
    entry = {"op_names": ["conv1d", "conv", "groups"], "target_names": ["weight"], "quant_dtype": "int4"}
    example = ((image(9, 9),), {})
    config = [{**entry, "granularity": granularity}]
    quantizer = shown(attached(Layers().eval(), example, method=method, config_list=config), image)
    quantizer.begin()
    quantizer.context.projection.project()
    return quantizer


@pytest.mark.parametrize("granularity", ["out_channel", "per_tensor", "in_channel", "per_group(3)"])
def test_every_kind_of_layer_loses_less_than_by_rounding_to_the_nearest(granularity):
    x = torch.cat([image(step, j) for step in range(2) for j in range(4)])
    before = Layers().eval()

    def outputs(model: Any) -> dict[str, torch.Tensor]:
        tokens = x.flatten(2).transpose(1, 2)
        return {"conv1d": model.conv1d(tokens), "conv": model.norm(model.conv(x)), "groups": model.groups(x)}

    lost: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for method in ("gptq", "round_to_nearest"):
            quantizer = layers(method, granularity)
            found, wanted = outputs(quantizer.context.model), outputs(before)
            lost[method] = {name: float((found[name] - wanted[name]).norm()) for name in found}
            for path in quantizer.parameters:
                compressed = quantizer.context.model.get_parameter(path)
                weight = quantizer.weights.fold_of(path).into(compressed) if path == "conv.weight" else compressed
                q = quantizer.parameters[path]
                torch.testing.assert_close(q.compress(weight), weight, rtol=1e-5, atol=1e-6)
    for name in lost["gptq"]:
        assert lost["gptq"][name] < 0.92 * lost["round_to_nearest"][name], name
    assert list(quantizer.weights.folds) == ["conv"]


def test_pruned_weights_stay_zero_and_the_others_make_up_for_it():
    keep = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) > 0.5
    model = Block()
    quantizer = attached(model, method="gptq", config_list=LINEAR)
    quantizer.context.projection.restore()
    quantizer.context.projection.add("q.weight", "mask", Masked(keep))
    quantizer.context.projection.project()
    shown(quantizer)
    quantizer.context.projection.restore()
    solved = model.q.weight.detach().clone()
    assert not solved[~keep].any() and solved[keep].count_nonzero() > 0.8 * keep.sum()
    quantizer.begin()
    quantizer.context.projection.project()
    assert torch.equal(model.q.weight, solved)
    masked = Block().q.weight.detach() * keep
    nearest = quantizer.parameters["q.weight"].compress(masked) * keep
    x = Block().norm1(torch.cat([micro(step, j) for step in range(2) for j in range(4)])).detach()
    assert (x @ (solved - masked).T).norm() < (x @ (nearest - masked).T).norm()


def broken(kind: str) -> str:
    model = Block()
    if kind == "nan":
        with torch.no_grad():
            model.k.weight[0, 0] = torch.nan
    options = {"dampening": 0.0} if kind == "singular" else {}
    quantizer = attached(model, method="gptq", config_list=LINEAR, options=options)
    if kind == "apply":
        quantizer.parameters["v.weight"].compress = lambda weight: weight / 2
    if kind == "silent":
        model.forward = lambda x: x
    inputs = (lambda step, j: micro(step, j)[:1, :1].expand(2, 2, SIZE)) if kind == "singular" else micro
    try:
        shown(quantizer, inputs, 1)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "k: gptq has no solution: weights or inputs are no finite numbers"),
        ("singular", "q: gptq has no solution: linalg.cholesky"),
        ("apply", "v: gptq has no solution: apply_method makes other numbers of those it was solved for"),
        ("silent", "q: gptq has no solution: nothing was heard of its inputs that is not zero"),
    ],
)
def test_a_layer_without_a_solution_stops_every_rank(ranks, kind, said):
    found = ranks(2, broken, kind)
    assert found[0] == found[1] and said in found[0] and "Raise the dampening" in found[0]


def test_parameters_that_cannot_be_solved_for_are_refused():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4))
    example = ((torch.tensor([[1, 2]]),), {})
    with pytest.raises(UserError, match="0.weight has the method gptq, .* this is the weight of a Embedding"):
        attached(model, example, method="gptq", config_list=[{"op_types": ["Embedding"], "target_names": ["weight"]}])
    with pytest.raises(UserError, match="1.bias has the method gptq, .* this is the bias of a Linear"):
        attached(model, example, method="gptq", config_list=[{"op_types": ["Linear"], "target_names": ["bias"]}])
