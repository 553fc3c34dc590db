"""GPTQ against the same algorithm with inverses in place of factors, and what it is for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from block_nets import LINEAR, SIZE, Block, attached, micro, shown

from dist_compress.errors import UserError


def reference(
    w: torch.Tensor, x: torch.Tensor, top: int, group: int, act_order: bool, affine: bool, dampening: float = 0.01
) -> torch.Tensor:
    """w, float64 [rows, features], rounded: one column after the other, and the inverse of H without what is done."""
    w, gram = w.double().clone(), x.double().T @ x.double()
    hessian = gram + dampening * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(len(gram))
    original, inverse = w.clone(), torch.linalg.inv(hessian)
    for done, c in enumerate(order.tolist()):
        first = c // group * group
        source = original if act_order else w  # of the scales; w as it is when the group is reached
        if act_order or c == first:
            columns = source[:, first : first + group].float()
            low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
            if affine:
                scale = (high - low) / (2 * top + 1)
                zero = -(top + 1) - (low / scale).round()
            else:
                scale, zero = torch.maximum(-low, high) / top, torch.zeros_like(low)
        lowest = -top - 1 if affine else -top
        q = (((w[:, c].float() / scale).round() + zero).clamp(lowest, top) - zero) * scale
        left = order[done + 1 :]
        w[:, left] -= ((w[:, c] - q) / inverse[c, c])[:, None] * inverse[c, left]
        w[:, c] = q.double()
        inverse = inverse - inverse[:, [c]] * inverse[[c], :] / inverse[c, c]
    return w


def heard(model: Block, layer: str) -> torch.Tensor:
    """[tokens, features]: all inputs of a layer in the calibration."""
    found = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda m, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(torch.cat([micro(step, j) for step in range(2) for j in range(4)]))
    hook.remove()
    return found[0].flatten(0, 1)


def solved(options: dict | None = None, **entry) -> tuple[Block, object]:
    model = Block()
    config = [{**LINEAR[0], **entry}]
    quantizer = shown(attached(model, method="gptq", config_list=config, options=options or {}))
    return model, quantizer


@pytest.mark.parametrize("block_size", [1, 5, 128])
@pytest.mark.parametrize(
    ("entry", "group", "act_order"),
    [
        ({}, 16, False),
        ({}, 16, True),
        ({"granularity": "per_group(4)"}, 4, False),
        ({"granularity": "per_group(4)"}, 4, True),
        ({"granularity": "per_group(8)", "quant_scheme": "affine"}, 8, False),
    ],
)
def test_every_layer_is_what_the_paper_makes_of_it(entry, group, act_order, block_size):
    options = {"weight_observer": "min_max", "act_order": act_order, "block_size": block_size}
    model, quantizer = solved(options, **entry)
    for layer in ("q", "o", "gate"):
        before = Block().get_parameter(f"{layer}.weight").detach()
        wanted = reference(before, heard(Block(), layer), 7, group, act_order, "quant_scheme" in entry)
        found = model.get_parameter(f"{layer}.weight").detach()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, quantizer.parameters[f"{layer}.weight"].compress(before))
    assert torch.equal(model.q.bias, Block().q.bias)


def correlated(step: int, j: int) -> torch.Tensor:
    """[128, 64], of a spectrum that falls as in real models: most of it lies in a few directions."""
    generator = torch.Generator().manual_seed(100 * step + j)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) / torch.arange(1.0, 65)[:, None]
    return torch.randn(128, 64, generator=generator) @ mix


def output_error(method: str, observer: str, **entry) -> float:
    torch.manual_seed(0)
    layer, before = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(64, 32, bias=False)
    before.load_state_dict(layer.state_dict())
    options = {} if method == "round_to_nearest" else {"weight_observer": observer}
    config = [{**LINEAR[0], **entry}]
    quantizer = attached(torch.nn.Sequential(layer), ((correlated(9, 9),), {}), method=method, config_list=config,
                         options=options)  # fmt: skip
    shown(quantizer, correlated)
    quantizer.begin()
    quantizer.context.projection.project()
    x = torch.cat([correlated(5, j) for j in range(4)])  # not what it was calibrated on
    return float((layer(x) - before(x)).detach().norm())


@pytest.mark.parametrize("bits", ["int3", "int4", "int8"])
@pytest.mark.parametrize("granularity", ["out_channel", "per_group(16)", "per_tensor"])
def test_outputs_lose_less_than_by_rounding_to_the_nearest(granularity, bits):
    entry = {"granularity": granularity, "quant_dtype": bits}
    for method, observer in (("round_to_nearest", "min_max"), ("ptq", "mse")):
        assert output_error("gptq", observer, **entry) < 0.6 * output_error(method, observer, **entry)


def test_inputs_that_are_not_correlated_leave_rounding_to_the_nearest():
    """The negative control: H is diagonal, and nothing can make up for an error."""
    model, before = torch.nn.Linear(SIZE, 3), torch.nn.Linear(SIZE, 3)
    model.load_state_dict(before.state_dict())
    whole = torch.nn.Sequential(model)
    quantizer = attached(whole, ((torch.eye(SIZE),), {}), 1, method="gptq", config_list=LINEAR)
    shown(quantizer, lambda step, j: torch.diag(torch.arange(1.0, SIZE + 1)))
    assert torch.equal(model.weight, quantizer.parameters["0.weight"].compress(before.weight))


def test_what_is_delivered_are_the_integers_that_were_solved_for():
    model, quantizer = solved(granularity="per_group(4)")
    held = {path: model.get_parameter(path).detach().clone() for path in quantizer.parameters}
    quantizer.begin()
    quantizer.context.projection.project()
    for path, weight in held.items():
        assert torch.equal(model.get_parameter(path), weight)
    quantizer.fold()
    for path, q in quantizer.parameters.items():
        weight, scale = model.get_parameter(path).detach(), q.scales_for(held[path])[0]
        assert torch.equal(weight, held[path]) and torch.equal(q.compress(weight), weight)
        level = weight.double() / scale.double()
        assert float((level - level.round()).abs().max()) < 1e-5 and float(level.round().abs().max()) == 7


def test_weights_that_meet_a_dead_feature_are_rounded_to_the_nearest():
    model, before = Block(), Block()
    with torch.no_grad():
        for net in (model, before):
            net.norm1.weight[2] = net.norm1.bias[2] = 0.0
    quantizer = shown(attached(model, method="gptq", config_list=LINEAR))
    nearest = quantizer.parameters["q.weight"].compress(before.q.weight)
    assert torch.equal(model.q.weight[:, 2], nearest[:, 2]) and nearest[:, 2].any()
    assert not torch.equal(model.q.weight, nearest)


def test_fp8_is_solved_for_too():
    model, quantizer = solved(quant_dtype="fp8_e4m3")
    assert torch.equal(quantizer.parameters["q.weight"].compress(model.q.weight), model.q.weight)
    assert not torch.equal(quantizer.parameters["q.weight"].compress(Block().q.weight), model.q.weight)


def test_weights_in_bfloat16_have_the_same_integers_when_they_are_quantized_again():
    layer = torch.nn.Linear(64, 32).bfloat16()
    example = ((correlated(9, 9).bfloat16(),), {})
    entry = [{**LINEAR[0], "quant_dtype": "int8"}]
    quantizer = attached(torch.nn.Sequential(layer), example, method="gptq", config_list=entry)
    shown(quantizer, lambda step, j: correlated(step, j).bfloat16())
    assert torch.equal(quantizer.parameters["0.weight"].compress(layer.weight), layer.weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dampening": -1.0}, "dampening=-1.0 must not be negative"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"weight_observer": "most"}, "weight_observer='most': no such choice"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(UserError, match=said):
        attached(Block(), method="gptq", options=options)
