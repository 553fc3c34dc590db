"""What is delivered: biases as integers, a description that rebuilds the model, no quantizer that is lost."""

from __future__ import annotations

import copy
import json

import torch
from nets import EXAMPLE, calibrated, net
from torch import nn

from dist_compress.quantization import describe, rebuild, round_biases
from dist_compress.quantization.deploy import quantizers


def delivered(**config) -> nn.Module:
    model = net()
    quantizer = calibrated(model, **{"method": "qat", **config})
    quantizer.fold()
    round_biases(model)
    return model.eval()


def test_biases_are_whole_numbers_of_the_product_of_scales():
    model = delivered()
    for name in ("conv1", "conv2", "linear"):
        layer = model.get_submodule(name)
        scale = layer.quantizer_input_0.scale * layer.quantizer_weight.scale.flatten()
        level = (layer.bias / scale).double()
        assert torch.equal(layer.quantizer_bias.scale, scale)
        torch.testing.assert_close(level, level.round(), atol=1e-2, rtol=1e-6)
    assert ("conv1", "bias") in quantizers(model)


def test_a_bias_stays_float_where_there_is_no_one_scale():
    model = delivered(config_list=[{"op_types": ["Conv2d"]}, {"op_types": ["Linear"], "granularity": "per_group(3)"}])
    assert ("conv1", "bias") in quantizers(model) and ("linear", "bias") not in quantizers(model)


def test_a_description_rebuilds_the_model():
    for method, entry in (
        ("qat", {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_0", "weight", "_output_0"]}),
        ("lsq", {"op_types": ["Linear"], "quant_dtype": "int4", "quant_scheme": "symmetric"}),
        ("ptq", {"op_types": ["Linear"], "target_names": ["_input_0"], "granularity": "per_token"}),
        ("ptq", {"op_types": ["Linear"], "target_names": ["weight"], "granularity": [2, 3]}),
        ("ptq", {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "fp8_e4m3"}),
    ):
        model = delivered(method=method, config_list=[entry])
        description = json.loads(json.dumps(describe(model)))
        other = net(9)
        rebuild(other, description)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(EXAMPLE), model(EXAMPLE))
        assert json.loads(json.dumps(describe(other))) == description
    assert describe(net()) is None


def test_a_copy_acts_with_its_own_quantizers():
    model = delivered()
    copied = copy.deepcopy(model)
    copied.conv1.quantizer_input_0.scale.mul_(50)
    assert not torch.equal(copied(EXAMPLE), model(EXAMPLE))
    assert torch.equal(copy.deepcopy(model)(EXAMPLE), model(EXAMPLE))
