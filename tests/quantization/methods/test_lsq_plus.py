"""Learned scale and offset: gradients against autograd, first values, zero, and what is left in the end."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, calibrated, net
from torch.nn import functional as F

from dist_compress.errors import UserError
from dist_compress.quantization import dtypes
from dist_compress.quantization.affine import fake_quantize
from dist_compress.quantization.methods.lsq_plus import LearnedOffset, gradients

LIST = [
    {
        "op_types": ["Conv2d", "Linear"],
        "target_settings": {"_input_0": {"quant_dtype": "uint4"}, "weight": {"quant_dtype": "int4"}},
    }
]


def by_autograd(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The formula of the paper, with the rounding as a constant."""
    level = (x - offset) / scale
    rounded = level + (level.round() - level).detach()
    return torch.where((level >= low) & (level <= high), rounded, level.detach().clamp(low, high)) * scale + offset


@pytest.mark.parametrize("scale_shape", [(1,), (5, 1)])
@pytest.mark.parametrize("name", ["uint4", "int8"])
def test_gradients_equal_autograd(scale_shape, name):
    dtype = dtypes.find(name, "affine", "")
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 40, generator=generator, dtype=torch.float64) * 20 / dtype.num_levels * 16).requires_grad_()
    scale = torch.rand(scale_shape, generator=generator, dtype=torch.float64) + 0.5
    zero_point = torch.randint(dtype.quant_min // 2, dtype.quant_max // 2, scale_shape, generator=generator)
    scale, offset = scale.requires_grad_(), (-zero_point * scale).detach().requires_grad_()
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    wanted = by_autograd(x, scale, offset, dtype.quant_min, dtype.quant_max)
    wanted.backward(upstream)
    args = (x.detach().float(), scale.detach().float(), zero_point.int())
    found = gradients(*args, upstream.float(), dtype)
    assert 0.2 < (x.grad == 0).float().mean() < 0.9 or name == "int8"
    for mine, truth in zip(found, (x, scale, offset), strict=True):
        torch.testing.assert_close(mine.double().sum_to_size(truth.shape), truth.grad, atol=2e-3, rtol=1e-3)
    x32, scale32, offset32 = (t.detach().float().requires_grad_() for t in (x, scale, offset))
    out = LearnedOffset.apply(x32, scale32, offset32, zero_point.int(), dtype, 0.5)
    torch.testing.assert_close(out.double(), wanted.detach(), atol=1e-4, rtol=1e-5)
    out.backward(upstream.float())
    torch.testing.assert_close(x32.grad, found[0])
    torch.testing.assert_close(offset32.grad, 0.5 * found[2].sum_to_size(scale_shape), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scale32.grad, 0.5 * found[1].sum_to_size(scale_shape), atol=1e-4, rtol=1e-4)


def test_values_by_hand():
    """uint2, scale 0.5, zero point 1: the numbers -0.5, 0, 0.5, 1."""
    dtype = dtypes.find("uint2", "affine", "")
    x = torch.tensor([-2.0, -0.3, 0.1, 0.8, 3.0])
    scale, zero_point = torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32)
    assert fake_quantize(x, scale, zero_point, dtype).tolist() == [-0.5, -0.5, 0.0, 1.0, 1.0]
    of_x, of_scale, of_offset = gradients(x, scale, zero_point, torch.ones(5), dtype)
    assert of_x.tolist() == [0, 1, 1, 1, 0]
    torch.testing.assert_close(of_scale, torch.tensor([0.0, -0.4, -0.2, 0.4, 3.0]))
    assert of_offset.tolist() == [1, 0, 0, 0, 1]


def test_first_values_are_those_of_the_calibration():
    model = net()
    quantizer = calibrated(model, method="lsq_plus", config_list=LIST)
    source = quantizer.activations["conv1._input_0"]
    zero = int(source.zero_point)
    assert 0 < zero < 15  # negative values are seen, and kept
    torch.testing.assert_close(source.offset.detach(), -zero * source.scale.detach())
    ptq = calibrated(net(), method="ptq", config_list=LIST).activations["conv1._input_0"]
    assert torch.equal(source.scale.detach(), ptq.scale) and torch.equal(source.zero_point, ptq.zero_point)
    weight, latent = quantizer.parameters["linear.weight"], quantizer.context.projection.latent("linear.weight")
    mean, std = latent.double().mean(1, keepdim=True), latent.double().std(1, keepdim=True, correction=0)
    wanted = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 8
    torch.testing.assert_close(weight.scale.detach(), wanted.float())
    assert "offset" not in weight._parameters


def test_the_offset_learns_and_zero_stays_a_number():
    model = net()
    quantizer = calibrated(model, method="lsq_plus", config_list=LIST)
    source = quantizer.activations["conv1._input_0"]
    assert {"conv1.quantizer_input_0.offset", "conv1.quantizer_input_0.scale"} < set(quantizer.undecayed())
    optimizer = torch.optim.SGD([source.offset, source.scale], lr=0.5)
    before = source.offset.item()
    x, y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 1, torch.arange(8) % 4
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        quantizer.after_step(step)
    assert source.offset.item() != before
    assert int(source.zero_point) == round(-source.offset.item() / source.scale.item())
    assert source(torch.zeros(1, 3, 8, 8)).abs().max() == 0


def test_what_is_delivered_has_buffers_only_and_computes_the_same():
    model = net()
    quantizer = calibrated(model, method="lsq_plus", config_list=LIST)
    wanted = model.eval()(EXAMPLE).detach()
    quantizer.fold()
    source = model.conv1.quantizer_input_0
    assert not list(source.parameters()) and {"scale", "zero_point"} == set(source.state_dict())
    torch.testing.assert_close(model(EXAMPLE), wanted, atol=1e-5, rtol=1e-5)


def test_no_dynamic_and_no_float():
    entry = {"op_types": ["Linear"], "target_names": ["_input_0"], "granularity": "per_token"}
    with pytest.raises(UserError, match="neither per_token nor fp8"):
        calibrated(net(), method="lsq_plus", config_list=[entry])
