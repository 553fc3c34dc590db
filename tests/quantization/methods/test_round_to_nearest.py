"""Round to nearest: parameters only, by their extent, without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import EXAMPLE, attached, net
from torch import nn

from dist_compress.errors import UserError


def rounded(model: nn.Module, example: torch.Tensor = EXAMPLE, **config: Any) -> Any:
    """No calibration at all."""
    quantizer = attached(model, example, method="round_to_nearest", **config)
    assert list(quantizer.rounds()) == []
    quantizer.begin()
    return quantizer


def test_groups_by_hand():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.7, -0.24, -3.5, 1.0]])
    entry = {"op_types": ["Linear"], "quant_dtype": "int4", "granularity": "per_group(2)"}
    quantizer = rounded(model, torch.randn(2, 4), config_list=[entry])
    # steps of 0.7 / 7 and 3.5 / 7, restricted: -7..7
    torch.testing.assert_close(model[0].weight.data, torch.tensor([[0.7, -0.2, -3.5, 1.0]]))
    assert list(quantizer.parameters) == ["0.weight"] and not quantizer.activations
    torch.testing.assert_close(quantizer.parameters["0.weight"].scale, torch.tensor([[0.1, 0.5]]))
    held = model[0].weight.detach().clone()
    quantizer.fold()
    assert torch.equal(model[0].weight, held)


def test_without_a_list_all_weights_and_nothing_else():
    model = net()
    quantizer = rounded(model)
    assert list(quantizer.parameters) == ["conv1.weight", "conv2.weight", "linear.weight"]
    latent = quantizer.context.projection.latent("linear.weight")
    assert (model.linear.weight - latent).abs().max() <= latent.abs().max() / 127 / 2 * 1.001


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"op_types": ["Linear"], "target_names": ["_input_0", "weight"]}, "for parameters only. Leave _input_0 out"),
        ({"op_types": ["ReLU"]}, "no weight to quantize, and its method is for parameters only"),
    ],
)
def test_activations_are_refused(entry, said):
    with pytest.raises(UserError, match=said):
        attached(net(), method="round_to_nearest", config_list=[entry])


def test_activations_may_have_a_method_of_their_own():
    entry = {"op_types": ["Linear"], "target_settings": {"_input_0": {"method": "ptq"}, "weight": {}}}
    quantizer = attached(net(), method="round_to_nearest", config_list=[entry])
    assert list(quantizer.activations) == ["linear._input_0"] and list(quantizer.rounds()) == [(quantizer.observed, 8)]
