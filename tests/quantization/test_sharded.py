"""Scales and quantized weights of sharded parameters are those of whole ones, bit for bit: every method, FSDP2 and flat
partitions."""

from __future__ import annotations

import pkgutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # also in the workers of the pool
from sharded_nets import set_gradient, whole  # noqa: E402
from sharded_training import Net, Parts, made, same  # noqa: E402

from dist_compress import comm  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402
from dist_compress.projection import Masked  # noqa: E402
from dist_compress.quantization import methods, weights  # noqa: E402
from dist_compress.quantization.config_list import fake_quantize_class  # noqa: E402
from dist_compress.quantization.setting import Setting  # noqa: E402
from dist_compress.schema import MixedConfig, SizeConfig  # noqa: E402

METHODS = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
CHANGES_WEIGHTS = {"awq", "gptq", "smoothquant"}
STEPS = 3


def entries(method: str) -> list[dict[str, Any]]:
    """One scale, one for each row, column, group and tile, where a method has them."""
    kind = fake_quantize_class(Setting("", "", method=method))
    targets = ["weight", "_input_0"] if kind.activations else ["weight"]
    layers = [{"op_types": ["Conv2d", "Linear"], "target_names": targets}]
    for name, granularity in {
        "conv2": "in_channel",
        "up": "per_tensor",
        "down": "per_group(16)",
        "head": [1, 5],
    }.items():
        dtype = {} if method == "bnn" else {"quant_dtype": "int4"}
        layers.append({"op_names": [name], "target_names": ["weight"], "granularity": granularity, **dtype})
    return layers


def run(kind: str, method: str) -> list[dict[str, Any]]:
    parts = made(kind, method=method, config_list=entries(method))
    parts.calibrate()
    trains = fake_quantize_class(Setting("", "", method=method)).trains
    return [parts.state(), *parts.train(range(STEPS if trains else 0))]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_scales_and_weights_of_whole_parameters(ranks, method):
    expected = ranks(1, run, "whole", method)[0]
    assert all(not torch.equal(a["latent up.weight"], b["latent up.weight"]) for a, b in pairwise(expected))
    assert all(not torch.equal(state["up.weight"], Net().up.weight) for state in expected)
    assert torch.equal(expected[0]["latent up.weight"], Net().up.weight) == (method not in CHANGES_WEIGHTS)
    for kind, size in (("fsdp", 2), ("fsdp", 4), ("flat", 3)):
        for found in ranks(size, run, kind, method):
            assert same(found, expected), (kind, size)


INT4 = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int4"}]


def masked(kind: str, method: str) -> list[dict[str, Any]]:
    """Rows, single weights and a channel of a folded norm are pruned."""
    parts = made(kind, method=method, config_list=INT4)
    generator = torch.Generator().manual_seed(3)
    for name, shape in (("conv1.weight", (6, 1, 1, 1)), ("down.weight", (10, 48)), ("bn2.weight", (7,))):
        keep = torch.rand(shape, generator=generator) > 0.4
        parts.projection.add(name, "mask", Masked(parts.layout.part(name, keep)))
    parts.calibrate()
    return [parts.state(), *parts.train(range(2))]


@pytest.mark.parametrize("method", ["qat", "lsq"])
def test_pruned_weights_have_no_part_in_a_range(ranks, method):
    expected = ranks(1, masked, "whole", method)[0]
    assert 0 < int((expected[-1]["down.weight"] == 0).sum()) < 480 and not (expected[0]["bn2.weight"] != 0).all()
    for kind, size in (("hsdp", 4), ("flat", 2)):
        for found in ranks(size, masked, kind, method):
            assert same(found, expected), (kind, size)
    for found in ranks(2, unreduced, method):  # the control
        assert "The ranks disagree on quantization scales" in found or not same(found, expected)


def unreduced(method: str) -> Any:
    """What becomes of it if each rank keeps what it sees to itself."""
    original = weights._reduced
    weights._reduced = lambda parts, op: parts
    try:
        return masked("flat", method)
    except RuntimeError as error:
        return str(error)
    finally:
        weights._reduced = original


def saved(kind: str, method: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    parts = made(kind, method=method, config_list=entries(method))
    parts.calibrate()
    parts.train(range(1))
    with parts.projection.lifted():
        state = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
        return {**state, **{name: whole(parts.layout, name) for name, _ in Net().named_parameters()}}, (
            parts.quantizer.state_dict()
        )


def resumed(kind: str, method: str, model: dict[str, torch.Tensor], state: dict[str, Any]) -> list[dict[str, Any]]:
    parts = made(kind, weights=model, method=method, config_list=entries(method))
    parts.quantizer.load_state_dict(state)
    parts.projection.project()
    return [parts.state(), *parts.train(range(1, 3))]


@pytest.mark.parametrize("method", ["dorefa", "lsq_plus"])
def test_a_state_of_any_sharding_goes_on_at_any_other(ranks, method):
    model, state = ranks(3, saved, "flat", method)[0]
    expected = ranks(1, resumed, "whole", method, model, state)[0]
    for found in ranks(2, resumed, "fsdp", method, model, state):
        assert same(found, expected)


def chosen(kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    mixed = MixedConfig(["int2", "int4", "int8"], SizeConfig(0.2), 4)
    entries = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"]}]
    parts = made(kind, mixed=mixed, method="ptq", config_list=entries)
    parts.calibrate()
    return [parts.state()], parts.quantizer.mixed.rows


def test_mixed_precision_measures_and_chooses_alike(ranks):
    expected, rows = ranks(1, chosen, "whole")[0]
    assert len({row["quant_dtype"] for row in rows if row["chosen"]}) > 1
    for found, others in ranks(2, chosen, "fsdp"):
        assert same(found, expected) and others == rows


class Layers(nn.Sequential):
    """Linear layers, a norm behind each of them."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(*(m for _ in range(num_layers) for m in (nn.Linear(8, 8), nn.BatchNorm1d(8))))


def calls(kind: str, method: str, num_layers: int) -> dict[str, int]:
    """Collectives of one step, but for those of the backend."""
    granularity = "per_tensor" if kind == "fsdp" else "out_channel"
    entry = {"op_types": ["Linear"], "target_names": ["weight"], "granularity": granularity}
    parts = made(kind, Layers(num_layers).eval(), torch.randn(2, 8), method=method, config_list=[entry])
    parts.quantizer.begin()
    parts.projection.project()
    for name in parts.quantizer.parameters:
        set_gradient(parts.layout, name, torch.ones(8, 8))
    comm.calls.clear()
    parts.quantizer.before_step(0)
    parts.projection.restore()
    parts.quantizer.after_step(0)
    parts.projection.project()
    return dict(comm.calls)


@pytest.mark.parametrize("method", ["qat", "lsq", "dorefa"])
def test_collectives_do_not_grow_with_the_layers(ranks, method):
    for kind in ("fsdp", "flat"):
        few, many = (ranks(2, calls, kind, method, num_layers)[0] for num_layers in (3, 12))
        norms = {} if method == "dorefa" else {"all_to_all": 1}  # it folds none
        ranges = {} if method == "lsq" else {"all_reduce": 1}
        gradients = {} if method == "qat" else {"ordered_sum": 1, "all_gather": 1}
        assert few == many == {**norms, **ranges, **gradients}, kind
    assert ranks(2, calls, "whole", method, 3)[0] == {}


def refused(kind: str) -> str:
    parts: Parts = made(kind, method="qat", config_list=INT4)

    class Own(type(parts.quantizer.parameters["up.weight"])):  # type: ignore[misc]
        def fit(self, weight: torch.Tensor) -> None: ...

    parts.quantizer.parameters["up.weight"].__class__ = Own
    try:
        parts.calibrate()
    except UserError as error:
        return str(error)
    return ""


def test_a_method_that_has_to_see_all_of_a_weight_at_every_step_is_refused(ranks):
    said = ranks(2, refused, "fsdp")
    assert said[0] == said[1] and "up.weight is sharded" in said[0] and "backend=ddp" in said[0]
    assert ranks(2, refused, "whole") == ["", ""]
