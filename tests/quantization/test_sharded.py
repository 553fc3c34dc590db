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

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # also in the workers of the pool
from sharded_training import Net, made, same  # noqa: E402

from dist_compress.quantization import methods  # noqa: E402
from dist_compress.quantization.config_list import fake_quantize_class  # noqa: E402
from dist_compress.quantization.setting import Setting  # noqa: E402

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
