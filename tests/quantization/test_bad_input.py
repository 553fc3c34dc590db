"""What is wrong with the configuration or the data of a quantization: the same line on every rank, and nobody waits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # also in the workers of the pool
from nets import EXAMPLE, attached, net  # noqa: E402

from dist_compress import comm  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402

LINEAR = {"op_types": ["Linear"]}


def one(**entry: Any) -> dict[str, Any]:
    return {"config_list": [{**LINEAR, **entry}]}


# What is configured; what the message says: key, value, what is allowed or what to do.
CONFIG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dtype": (one(quant_dtype="int9"), ["config_list[0].quant_dtype='int9'", "Available: int2, int3"]),
    "scheme": (one(quant_scheme="log"), ["config_list[0].quant_scheme='log'", "Available: affine, symmetric"]),
    "scheme of a dtype": (one(quant_dtype="fp8_e4m3", quant_scheme="affine"), ["'affine'", "Use quant_scheme: sym"]),
    "granularity": (one(granularity="per_row"), ["config_list[0].granularity='per_row'", "allowed are default"]),
    "granularity of a parameter": (one(target_names=["weight"], granularity="per_token"), ["linear", "out_channel"]),
    "granularity of an input": (one(target_names=["_input_0"], granularity="out_channel"), ["per_channel, per_token"]),
    "group": (one(granularity="per_group(4)"), ["per_group(4)", "has size 6", "no multiple of 4. Choose a size"]),
    "block": (one(target_names=["weight"], granularity=[3, 4]), ["linear", "no multiple", "Choose a size"]),
    "module": ({"config_list": [{"op_names": ["lineal"]}]}, ["config_list[0].op_names", "lineal", "linear"]),
    "type": ({"config_list": [{"op_types": ["LSTM"]}]}, ["config_list[0].op_types", "LSTM", "Conv2d"]),
    "target": (one(target_names=["_input_3"]), ["config_list[0].target_names", "'_input_3'", "they have _input_0"]),
    "parameter": (one(target_names=["kernel"]), ["config_list[0].target_names", "'kernel'; they have bias, weight"]),
    "key": (one(quant_dtyp="int8"), ["config_list[0].quant_dtyp: no such key. Did you mean quant_dtype?"]),
    "selects nothing": ({"config_list": [{"quant_dtype": "int8"}]}, ["config_list[0] selects nothing: give op_types"]),
    "no method": ({"method": None, **one()}, ["config_list[0] sets no method", "nor does quantization.method. Set"]),
    "method": ({"method": "ptq_"}, ["quantization.method='ptq_'", "Available: awq, bnn", "dotted path"]),
    "kinds": ({"config_list": [LINEAR, {"op_types": ["Conv2d"], "method": "qat"}]}, ["qat, ptq", "Use one kind"]),
    "default settings": ({"default_settings": {"LSTM": {}}}, ["default_settings.LSTM", "Types: "]),
    "fused": (one(fuse_names=[["linear", "relu"]]), ["fuse_names=['linear', 'relu']", "relu does not follow linear"]),
    "container": ({"config_list": [{"op_names": ["inner"], "target_names": ["_output_0"]}]}, ["inner, a container"]),
    "option of ptq": ({"options": {"observer": "max"}}, ["options.observer='max'", "Available: min_max, perc"]),
    "key of ptq": ({"options": {"observe": "mse"}}, ["options.observe: no such key", "observer"]),
    "range of ptq": ({"options": {"percentile": 2}}, ["options.percentile=2", "at most 1"]),
    "option of qat": ({"method": "qat", "options": {"momentum": 1}}, ["options.momentum=1", "below 1"]),
    "type of qat": ({"method": "qat", "options": {"momentum": "x"}}, ["options.momentum", "'x'", "float"]),
    "key of lsq": ({"method": "lsq", "options": {"gain": 1}}, ["options.gain"]),
    "key of lsq_plus": ({"method": "lsq_plus", "options": {"gain": 1}}, ["options.gain"]),
    "option of pact": ({"method": "pact", "options": {"decay": -1}}, ["options.decay=-1", "at least 0"]),
    "option of dorefa": ({"method": "dorefa", "options": {"gradient_bits": 1}}, ["gradient_bits=1", "2 to 16"]),
    "key of bnn": ({"method": "bnn", "options": {"scale": 1}}, ["options.scale"]),
    "key of rounding": ({"method": "round_to_nearest", "options": {"x": 1}}, ["options.x"]),
    "dtype of lsq": ({"method": "lsq", **one(quant_dtype="fp8_e4m3")}, ["neither per_token nor fp8. Choose ptq"]),
    "dtype of pact": ({"method": "pact", **one(granularity="per_token")}, ["neither per_token nor fp8"]),
    "dtype of dorefa": ({"method": "dorefa", **one(quant_dtype="int4")}, ["quant_dtype=int4", "such as uint4"]),
    "dtype of bnn": ({"method": "bnn", **one(quant_dtype="int4")}, ["quant_dtype=int4", "Leave both out"]),
    "binary of qat": ({"method": "qat", **one(quant_dtype="binary")}, ["quant_dtype='binary'", "Choose method: bnn"]),
}


class Nested(nn.Module):
    """The usual net, and a container."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(net().__dict__)
        self.inner = nn.Sequential(nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.inner(self.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def refused_configs() -> dict[str, str]:
    found = {}
    for name, (config, _) in CONFIG.items():
        try:
            attached(Nested(), EXAMPLE, **{"method": "ptq", **config})
        except UserError as error:
            found[name] = str(error)
    return found


def test_every_error_of_a_configuration_is_one_line_and_the_same_on_every_rank(ranks):
    first, second = ranks(2, refused_configs)
    assert first == second
    wrong = {
        name: first.get(name, "nothing was wrong")
        for name, (_, said) in CONFIG.items()
        if "\n" in first.get(name, "\n") or not all(part in first[name] for part in said)
    }
    assert wrong == {}


def nothing_to_quantize() -> str:
    try:
        attached(nn.Sequential(nn.ReLU(), nn.Flatten()), EXAMPLE, method="ptq")
    except UserError as error:
        return str(error)
    return ""


def starts() -> list[str]:
    found = []
    for start, method in (("3steps", "ptq"), ("20steps", "qat")):
        quantizer = attached(net(), method=method, start=start)
        try:
            quantizer.start_step(None)
        except UserError as error:
            found.append(str(error))
    return found


def bad_data(kind: str) -> str:
    """Calibration data of rank 1 that is broken, or of nobody that is there."""
    model = net()
    quantizer = attached(model, method="qat")
    quantizer.observed.calibrating = True
    x = torch.randn(4, 3, 8, 8)
    if comm.rank() == 1:
        x[0, 0, 0, 0] = float(kind) if kind in ("nan", "inf") else 0.0
    with torch.no_grad():
        if kind != "none":
            model.eval()(x)
            quantizer.observed.count_pass()
        quantizer.observed.end_step()
    quantizer.observed.calibrating = False
    try:
        quantizer.begin()
    except UserError as error:
        return str(error)
    return ""


def test_nothing_to_quantize_and_impossible_starts(ranks):
    first, second = ranks(2, nothing_to_quantize)
    assert first == second and "has no convolution or linear layer. Add one." in first and "\n" not in first
    early, late = ranks(2, starts)[1]
    assert "quantization.start='3steps' is step 3 of 10" in early and "Leave it null" in early
    assert "is step 20, but the run has 10. Lower it" in late


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "conv1._input_0: 1 of 1536 values are NaN or infinite on the calibration data"),
        ("inf", "conv1._input_0: 1 of 1536 values are NaN or infinite on the calibration data"),
        ("none", "conv1._input_0: no calibration data reached it (0 values seen). Raise quantization.calibration_st"),
        ("fine", ""),
    ],
)
def test_bad_calibration_data_of_one_rank_is_an_error_of_all(ranks, kind, said):
    first, second = ranks(2, bad_data, kind)
    assert first == second and said in first and "\n" not in first
