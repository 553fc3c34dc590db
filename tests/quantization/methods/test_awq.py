"""AWQ by hand, and what it is for."""

from __future__ import annotations

import pytest
import torch
from block_nets import LINEAR, Block, attached, micro, shown

from dist_compress.errors import UserError


def by_hand(model: Block, xs: torch.Tensor, num_steps: int) -> tuple[float, torch.Tensor]:
    """The exponent and the scales of norm1 -> q, k, v, int4 by row, symmetric_restricted: -7..7."""
    y = model.norm1(xs).detach().double().flatten(0, 1)
    size = y.abs().mean(0)
    weights = [layer.weight.detach().double() for layer in (model.q, model.k, model.v)]
    errors = []
    for k in range(num_steps + 1):
        s = size ** (k / num_steps)
        s = s / (s.max() * s.min()).sqrt()
        total = 0.0
        for w in weights:
            step = (w * s).abs().amax(1, keepdim=True) / 7
            rounded = ((w * s) / step).round().clamp(-7, 7) * step / s
            total += float((y @ (rounded - w).T).square().sum())
        errors.append((total, k, s))
    assert len({e for e, _, _ in errors}) > 5
    _, k, s = min(errors, key=lambda item: item[0])
    return k / num_steps, s


def test_scales_are_those_with_the_smallest_error_of_the_outputs():
    model, before = Block(), Block()
    exponent, s = by_hand(before, torch.cat([micro(step, j) for step in range(2) for j in range(4)]), 20)
    assert 0 < exponent < 1
    shown(attached(model, method="awq", config_list=LINEAR, options={"weight_observer": "min_max"}))
    torch.testing.assert_close(model.norm1.weight.detach(), (before.norm1.weight.detach() / s).float())
    torch.testing.assert_close(model.norm1.bias.detach(), (before.norm1.bias.detach() / s).float())
    torch.testing.assert_close(model.k.weight.detach(), (before.k.weight.detach() * s).float())


def output_error(layer: str, method: str, **entry) -> float:
    """Of one layer's outputs, on the inputs of the calibration, once its weight is quantized."""
    model, before = Block(), Block()
    options = {"weight_observer": "min_max"} if method == "awq" else {}
    quantizer = shown(attached(model, method=method, config_list=[{**LINEAR[0], **entry}], options=options))
    quantizer.begin()
    with quantizer.context.projection.lifted():
        inputs = {}
        for net in (model, before):
            net.get_submodule(layer).register_forward_pre_hook(lambda m, args, key=net: inputs.update({key: args[0]}))
            net(torch.cat([micro(step, j) for step in range(2) for j in range(4)]))
    path = f"{layer}.weight"
    quantized = quantizer.parameters[path].compress(quantizer.context.projection.latent(path))
    lost = inputs[model] @ quantized.T - inputs[before] @ before.get_parameter(path).T
    return float(lost.detach().norm())


@pytest.mark.parametrize("granularity", ["out_channel", "per_group(8)"])
@pytest.mark.parametrize("layer", ["q", "down"])
def test_outputs_lose_less_than_by_rounding_to_the_nearest(layer, granularity):
    error = {m: output_error(layer, m, granularity=granularity) for m in ("awq", "round_to_nearest")}
    assert error["awq"] < 0.9 * error["round_to_nearest"]


def test_a_channel_that_is_always_zero_stays():
    model = Block()
    with torch.no_grad():
        model.norm1.weight[2] = model.norm1.bias[2] = 0.0
    shown(attached(model, method="awq", config_list=LINEAR))
    assert torch.equal(model.q.weight[:, 2], Block().q.weight[:, 2])
    assert not torch.equal(model.q.weight[:, 3], Block().q.weight[:, 3])


def test_activations_stay_as_they_are():
    assert not attached(Block(), method="awq").activations
    with pytest.raises(UserError, match="is for parameters only"):
        attached(Block(), method="awq", config_list=[{"op_types": ["Linear"], "target_names": ["_input_0"]}])


def test_refusals():
    with pytest.raises(UserError, match="options.num_steps=0 must be at least 1"):
        attached(Block(), method="awq", options={"num_steps": 0})
    with pytest.raises(UserError, match="weight_observer='most': no such choice. Available: min_max, mse"):
        attached(Block(), method="awq", options={"weight_observer": "most"})
