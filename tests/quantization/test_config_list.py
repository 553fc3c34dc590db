"""`quantization.config_list`: defaults, precedence, and errors that name key, value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from nets import EXAMPLE, attached, net

from dist_compress.config import QuantizationConfig
from dist_compress.errors import UserError
from dist_compress.quantization.config_list import build, resolve
from dist_compress.quantization.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from dist_compress.sites import Sites


def resolved(**config: Any) -> dict[str, Any]:
    model = net()
    settings = resolve(QuantizationConfig(**{"method": "qat", **config}), model, Sites(model, (EXAMPLE,)))
    return {s.path: (s, build(s, model, Sites(model, (EXAMPLE,)))) for s in settings}


def test_without_a_list_every_layer_is_quantized_the_usual_way():
    found = resolved()
    assert list(found) == [f"{m}.{t}" for m in ("conv1", "conv2", "linear") for t in ("_input_0", "weight")]
    source, weight = found["conv1._input_0"][1].spec, found["conv1.weight"][1].spec
    assert (source.dtype.name, source.scheme, source.granularity) == ("uint8", "affine", PerTensor())
    assert (weight.dtype.name, weight.dtype.quant_min, weight.granularity) == ("int8", -127, PerChannel(0))
    assert source.masked and not resolved(method="ptq")["conv1._input_0"][1].spec.masked


def test_entries_defaults_and_target_settings():
    found = resolved(
        default_settings={"Linear": {"weight": {"quant_dtype": "int4"}, "_input_0": {}, "bias": {}}},
        config_list=[
            {"op_types": ["Conv2d", "Linear"], "quant_scheme": "symmetric"},
            {"op_names": ["conv2"], "target_names": ["weight", "_output_0"], "quant_dtype": "int6"},
            {"op_types": ["Linear"], "target_settings": {"weight": {"granularity": "per_group(3)"}}},
        ],
    )
    said = {path: (s.quant_dtype, s.quant_scheme, s.granularity) for path, (s, _) in found.items()}
    assert said["linear.weight"] == ("int4", "symmetric", "per_group(3)")
    assert said["linear.bias"] == ("int8", "symmetric", "out_channel")
    assert said["conv2.weight"] == said["conv2.weight"][:0] + ("int6", "symmetric", "out_channel")
    assert said["conv2._output_0"] == ("int6", "affine", "per_tensor")
    assert said["conv1._input_0"] == ("uint8", "symmetric", "per_tensor")
    assert found["linear.weight"][1].scale.shape == (4, 2)


@pytest.mark.parametrize(
    ("target", "value", "wanted"),
    [
        ("weight", "per_tensor", PerTensor()),
        ("weight", "in_channel", PerChannel(1)),
        ("weight", "per_channel", PerChannel(0)),
        ("weight", [2, -1], PerBlock((2, -1))),
        ("weight", [[2], "back", -1], PerBlock((2, -1))),
        ("_input_0", "per_channel", PerChannel(1)),
        ("_input_0", "per_token", PerToken()),
        ("_input_0", "per_group(3)", PerBlock((-1, 3))),
        ("weight", "per_group(3)", PerGroup(3)),
        ("_input_0", [-1, 2], PerBlock((-1, 2))),
    ],
)
def test_granularities(target, value, wanted):
    entry = {"op_types": ["Linear"], "target_names": [target], "granularity": value}
    assert resolved(config_list=[entry])[f"linear.{target}"][1].spec.granularity == wanted


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"op_types": ["Linear"], "quant_dtype": "int9"}, ["config_list[0].quant_dtype='int9'", "int8", "fp8_e4m3"]),
        ({"op_types": ["Linear"], "quant_scheme": "log"}, ["quant_scheme='log'", "affine"]),
        ({"op_types": ["Linear"], "apply_method": "mul"}, ["apply_method='mul'", "qat_clamp_round"]),
        ({"op_types": ["Linear"], "granularity": "per_row"}, ["granularity='per_row'", "per_channel"]),
        ({"op_types": ["Linear"], "granularity": "per_group(0)"}, ["per_group(0)"]),
        ({"op_types": ["Linear"], "target_names": ["weight"], "granularity": "per_group(4)"}, ["no multiple of 4"]),
        ({"op_types": ["Linear"], "target_names": ["weight"], "granularity": "per_token"}, ["a parameter has"]),
        ({"op_types": ["Linear"], "quant_dtype": "fp8_e4m3", "quant_scheme": "affine"}, ["no zero point"]),
        ({"op_types": ["Linear"], "target_names": ["_input_0"], "quant_scheme": "symmetric_restricted"}, ["signed"]),
        ({"op_types": ["Linear"], "target_names": ["_input_7"]}, ["_input_7", "_input_0"]),
        ({"op_types": ["Linear"], "target_names": ["_input_0"], "granularity": [2, 2]}, ["is the batch"]),
        ({"op_types": ["Linear"], "method": "gptqq"}, ["gptqq", "pact, ptq, qat, round_to_nearest"]),
        ({"op_types": ["Linear"], "bits": 8}, ["config_list[0].bits"]),
        ({"op_types": ["Linear"], "fuse_names": ["linear"]}, ["fuse_names", "list of lists"]),
    ],
)
def test_errors_name_what_is_wrong(entry, said):
    with pytest.raises(UserError) as error:
        resolved(config_list=[entry])
    assert all(part in str(error.value) for part in said), error.value


def test_ptq_and_training_do_not_mix():
    with pytest.raises(UserError, match="ptq quantizes a model whose training is over"):
        attached(net(), method="qat", config_list=[{"op_types": ["Conv2d"]}, {"op_types": ["Linear"], "method": "ptq"}])


def test_seven_bits_where_the_range_is_reduced():
    assert attached(net(), method="qat", reduce_range=True).parameters["conv1.weight"].spec.dtype.name == "int7"
    assert attached(net(), method="qat", reduce_range=False).notes() == []
    assert "7 bits" in attached(net(), method="qat", reduce_range=True).notes()[0]
