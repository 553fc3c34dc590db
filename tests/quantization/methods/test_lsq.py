"""Learned step sizes: gradients against autograd, the first scale, the gradient scale."""

from __future__ import annotations

import math

import pytest
import torch
from nets import calibrated, net
from torch.nn import functional as F

from dist_compress.errors import UserError
from dist_compress.quantization.methods.lsq import LearnedStep, gradients

LIST = [
    {
        "op_types": ["Conv2d", "Linear"],
        "target_settings": {
            "_input_0": {"quant_dtype": "int8", "quant_scheme": "symmetric"}, "weight": {"quant_dtype": "int4"},
        },
    }
]  # fmt: skip


def by_autograd(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """LSQ with the rounding as a constant: what autograd makes of it is equations 3 and 5 of the paper."""
    level = x / scale
    inside = (level >= low) & (level <= high)
    rounded = level + (level.round() - level).detach()
    return torch.where(inside, rounded, level.detach().clamp(low, high)) * scale


@pytest.mark.parametrize("scale_shape", [(1,), (5, 1)])
def test_gradients_equal_autograd(scale_shape):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 40, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    scale = (torch.rand(scale_shape, generator=generator, dtype=torch.float64) * 0.3 + 0.1).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    by_autograd(x, scale, -8, 7).backward(upstream)
    of_x, of_scale = gradients(x.detach().float(), scale.detach().float(), upstream.float(), -8, 7)
    torch.testing.assert_close(of_x.double(), x.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(of_scale.double().sum_to_size(scale_shape), scale.grad, atol=1e-4, rtol=1e-4)
    x32, scale32 = x.detach().float().requires_grad_(), scale.detach().float().requires_grad_()
    LearnedStep.apply(x32, scale32, -8, 7, 0.5).backward(upstream.float())
    torch.testing.assert_close(x32.grad, of_x)
    torch.testing.assert_close(scale32.grad, 0.5 * of_scale.sum_to_size(scale_shape), atol=1e-5, rtol=1e-4)


def test_first_scales_and_gains():
    model = net()
    quantizer = calibrated(model, method="lsq", config_list=LIST)
    weight = quantizer.parameters["linear.weight"]
    latent = quantizer.context.projection.latent("linear.weight")
    torch.testing.assert_close(weight.scale, 2 * latent.abs().mean(1, keepdim=True) / math.sqrt(7))
    assert weight.gain == 1 / math.sqrt(6 * 7)  # 6 weights share a scale
    source = quantizer.activations["conv1._input_0"]
    generator = torch.Generator().manual_seed(7)
    mean = torch.cat([torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2)]).abs().mean()
    torch.testing.assert_close(source.scale.detach()[0], 2 * mean / math.sqrt(127), rtol=1e-3, atol=0)
    assert source.gain == 1 / math.sqrt(3 * 8 * 8 * 127)  # features of a sample, not of a batch
    assert source.observer is None and source.zero_point.item() == 0


def test_scales_of_weights_learn_by_projection_what_autograd_says():
    """Also behind a norm, where the parameter holds Q(w * f) / f."""
    model = net()
    quantizer = calibrated(model, method="lsq", config_list=LIST)
    latents = {n: quantizer.context.projection.latent(n).clone() for n in ("linear.weight", "conv1.weight")}
    model.eval()
    x, y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 4
    F.cross_entropy(model(x), y).backward()
    found = {name: model.get_parameter(name).grad.clone() for name in latents}
    quantizer.before_step(0)
    for name, latent in latents.items():
        q, fold = quantizer.parameters[name], quantizer.weights.fold_of(name)
        w, scale = latent.requires_grad_(), q.scale.detach().clone().requires_grad_()
        factor = 1.0 if fold is None else fold.used
        compressed = by_autograd(w * factor, scale, -8, 7) / factor
        compressed.backward(found[name])
        torch.testing.assert_close(q.scale.grad, scale.grad * q.gain, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(model.get_parameter(name).grad, w.grad)


def test_a_scale_is_a_parameter_that_trains():
    model = net()
    quantizer = calibrated(model, method="lsq", config_list=LIST)
    names = [name for name, _ in model.named_parameters() if name.endswith("scale")]
    assert len(names) == 6
    assert sorted(names) == sorted(quantizer.undecayed())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    model.train()
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    F.cross_entropy(model(x), y).backward()
    quantizer.before_step(0)
    quantizer.context.projection.restore()
    optimizer.step()
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in names)
    quantizer.after_step(0)
    quantizer.context.projection.project()
    level = model.linear.weight / model.linear.quantizer_weight.scale
    torch.testing.assert_close(level, level.round())


def test_no_dynamic_and_no_float():
    with pytest.raises(UserError, match="neither per_token nor fp8"):
        calibrated(net(), method="lsq", config_list=[{"op_types": ["Linear"], "quant_dtype": "fp8_e4m3"}])
