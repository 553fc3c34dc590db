"""Signs: values, gradients, clipped latents, what is stored, loaded and refused."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, attached, calibrated, net
from torch import nn
from torch.nn import functional as F

from dist_compress.errors import UserError
from dist_compress.export import onnx
from dist_compress.quantization import convert, deploy, dtypes
from dist_compress.quantization.affine import dequantize, fake_quantize, in_range, quantize
from dist_compress.quantization.methods.bnn import Sign

BINARY = dtypes.DTYPES["binary"]


def test_a_dtype_of_two_numbers():
    x = torch.tensor([-2.0, -0.1, -0.0, 0.0, 0.3, 5.0])
    scale, zero = torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32)
    stored = quantize(x, scale, zero, BINARY)
    assert stored.tolist() == [-1, -1, 1, 1, 1, 1] and stored.dtype == torch.int8 and BINARY.num_levels == 2
    assert fake_quantize(x, scale, zero, BINARY).tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5]
    assert torch.equal(dequantize(stored, scale, zero), fake_quantize(x, scale, zero, BINARY))
    assert in_range(x, scale, zero, BINARY).tolist() == [False, True, True, True, True, False]


def test_gradients_of_activations_are_those_of_the_hard_tanh():
    x = (torch.arange(-24, 25, dtype=torch.float64) / 8).requires_grad_()
    upstream = torch.arange(49.0, dtype=torch.float64) + 1
    soft = F.hardtanh(x)
    (soft + (torch.where(x >= 0, 1.0, -1.0) - soft).detach()).backward(upstream)
    x32 = x.detach().float().requires_grad_()
    out = Sign.apply(x32)
    out.backward(upstream.float())
    assert set(out.tolist()) == {-1.0, 1.0} and out[24] == 1  # of zero
    ends = x.detach().abs() == 1  # the derivative there is a matter of taste; the paper's mask has them
    torch.testing.assert_close(x32.grad.double()[~ends], x.grad[~ends])
    assert torch.equal(x32.grad[ends].double(), upstream[ends])


def test_weights_are_signs_and_latents_stay_within_one():
    model = net()
    quantizer = calibrated(model, method="bnn")
    latent = quantizer.context.projection.latent("conv1.weight")
    assert torch.equal(model.conv1.weight, torch.where(latent >= 0, 1.0, -1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    F.cross_entropy(model.train()(EXAMPLE), torch.arange(2)).backward()
    grad = model.conv1.weight.grad.clone()
    quantizer.before_step(0)
    assert torch.equal(model.conv1.weight.grad, grad)
    quantizer.context.projection.restore()
    expected = (latent - 3.0 * grad).clamp(-1, 1).clone()
    optimizer.step()
    quantizer.after_step(0)
    torch.testing.assert_close(model.conv1.weight.data, expected)
    assert (expected.abs() == 1).any() and (expected.abs() < 1).any()
    quantizer.context.projection.project()
    assert set(model.conv1.weight.flatten().tolist()) == {-1.0, 1.0}


def test_described_rebuilt_and_refused_by_onnx():
    model = net()
    quantizer = calibrated(model, method="bnn")
    wanted = model.eval()(EXAMPLE).detach()
    quantizer.fold()
    deploy.round_biases(model)
    assert "quantizer_bias" not in dict(model.linear.named_children())  # no units of signs
    described = deploy.describe(model)
    assert described["quantizers"][1]["quant_dtype"] == "binary"
    other = net(1)
    deploy.rebuild(other, described)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(EXAMPLE), wanted)
    torch.testing.assert_close(convert.convert(model)(EXAMPLE), wanted)
    targets = {place: q.spec for place, q in deploy.quantizers(model).items()}
    with pytest.raises(UserError, match=r"onnx\]: conv1\._input_0 is quantized to binary, and no operator of ONNX"):
        onnx.ready(net(), targets, ((EXAMPLE,), {}))


def test_binary_weights_alone_are_held_by_the_integer_export():
    model = net()
    entry = {"op_types": ["Conv2d"], "target_names": ["weight"]}
    quantizer = calibrated(model, method="bnn", config_list=[entry])
    quantizer.fold()
    converted = convert.convert(model)
    assert converted.conv1.parametrizations.weight.original.dtype == torch.int8
    torch.testing.assert_close(converted(EXAMPLE), model.eval()(EXAMPLE))


def test_pruned_zeros_are_refused():
    quantizer = attached(net(), method="bnn", config_list=[{"op_types": ["Linear"], "target_names": ["weight"]}])
    from dist_compress.projection import Masked

    quantizer.context.projection.add("linear.weight", "mask", Masked(torch.arange(6) > 2))
    with pytest.raises(UserError, match=r"linear\.weight: quant_dtype=binary has no zero"):
        quantizer.begin()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"method": "bnn", "config_list": [{"op_types": ["Linear"], "quant_dtype": "int8"}]}, "bnn takes signs"),
        ({"method": "qat", "config_list": [{"op_types": ["Linear"], "quant_dtype": "binary"}]}, "two signs have no"),
        ({"method": "bnn", "config_list": [{"op_types": ["Linear"], "quant_scheme": "affine"}]}, "no zero point"),
        ({"method": "bnn", "options": {"x": 1}}, "quantization.options.x"),
    ],
)
def test_what_does_not_fit(config, said):
    with pytest.raises(UserError, match=said):
        attached(net(), **config)


def test_a_norm_behind_stays():
    model = net()
    assert not calibrated(model, method="bnn").weights.folds and isinstance(model.bn1, nn.BatchNorm2d)
