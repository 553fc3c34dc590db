"""Quantization-aware training: delayed ranges, straight-through gradients, folded norms, freezing."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, calibrated, net
from torch import nn
from torch.nn import functional as F

from dist_compress.errors import UserError
from dist_compress.quantization.affine import fake_quantize


def test_the_weight_of_a_step_is_quantized_by_its_own_extent():
    model = net()
    quantizer = calibrated(model, method="qat")
    q = quantizer.parameters["linear.weight"]
    latent = quantizer.context.projection.latent("linear.weight")
    scale = latent.abs().amax(1, keepdim=True) / 127
    assert torch.equal(q.scale, scale)
    assert torch.equal(model.linear.weight, fake_quantize(latent, scale, q.zero_point, q.spec.dtype))
    assert not torch.equal(model.linear.weight, latent)


def test_folded_weights_are_quantized_and_the_norm_undoes_the_folding():
    model = net()
    quantizer = calibrated(model, method="qat")
    latent, norm = quantizer.context.projection.latent("conv1.weight"), model.bn1
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    folded = latent * factor
    scale = folded.abs().flatten(1).amax(1).view(-1, 1, 1, 1) / 127
    wanted = torch.round(folded / scale) * scale
    torch.testing.assert_close(model.conv1.weight * factor, wanted, atol=1e-6, rtol=1e-5)
    bias = norm.bias - norm.running_mean * factor.flatten()
    x = quantizer.activations["conv1._input_0"](EXAMPLE)
    with torch.no_grad():
        torch.testing.assert_close(norm.eval()(model.conv1(EXAMPLE)), F.conv2d(x, wanted, bias, padding=1))


def test_gradients_are_those_of_autograd_through_the_quantizers():
    """Of the reference: a net that quantizes inside of forward, with straight-through estimators."""
    model = net()
    quantizer = calibrated(model, method="qat", config_list=[{"op_types": ["Linear"]}])
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    F.cross_entropy(model(x), y).backward()
    quantizer.before_step(0)
    reference = net().eval()
    weight = reference.linear.weight
    q, a = quantizer.parameters["linear.weight"], quantizer.activations["linear._input_0"]
    compressed = weight + (q.compress(weight) - weight).detach()
    reference.linear = nn.Identity()
    hidden = reference(x)
    hidden = torch.fake_quantize_per_tensor_affine(hidden, a.scale, a.zero_point, 0, 255)
    F.cross_entropy(F.linear(hidden, compressed, model.linear.bias.detach()), y).backward()
    torch.testing.assert_close(model.linear.weight.grad, weight.grad)
    torch.testing.assert_close(model.conv1.weight.grad, reference.conv1.weight.grad)


def test_ranges_are_one_step_late_and_freeze():
    model = net()
    quantizer = calibrated(model, method="qat", options={"momentum": 0.5}, freeze="2steps")
    q = quantizer.activations["conv1._input_0"]
    model.train()
    scales = [q.scale.item()]
    for step in range(4):
        x = EXAMPLE * 4.0 ** (step + 1)
        before = q.scale.item()
        out = q.quantized(x, *q.scales_for(x))
        model(x)
        assert q.scale.item() == before and out.max() <= 256 * before  # the range of the step before
        quantizer.after_backward(step, 0)
        quantizer.after_step(step)
        scales.append(q.scale.item())
    assert scales[0] < scales[1] < scales[2] == scales[3] == scales[4]
    assert not model.bn1.training  # its statistics are frozen with the ranges
    low, high = q.observer.range()
    assert scales[-1] == ((high - low) / 255).item()


def test_evaluation_and_dummy_passes_are_not_observed():
    model = net()
    quantizer = calibrated(model, method="qat")
    q = quantizer.activations["conv1._input_0"]
    counts = q.observer.counts.tolist()
    model.eval()(EXAMPLE)
    quantizer.after_backward(0, 0)
    model.train()(EXAMPLE * 100)  # a dummy: no micro-batch of this rank
    model(EXAMPLE)
    quantizer.after_backward(0, 0)
    quantizer.after_step(0)
    assert q.observer.counts.tolist() == [counts[0] + EXAMPLE.numel(), 0]


def test_bad_momentum():
    with pytest.raises(UserError, match="momentum=1.0: must be at least 0 and below 1"):
        calibrated(net(), method="qat", options={"momentum": 1.0})
