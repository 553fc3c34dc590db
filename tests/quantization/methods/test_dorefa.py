"""DoReFa: values and gradients against the formulas of the paper, random gradients, what it refuses."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, attached, calibrated, net

from dist_compress.errors import UserError
from dist_compress.quantization.methods.dorefa import Bounded, rounded_gradient

LIST = [
    {
        "op_types": ["Conv2d", "Linear"],
        "target_settings": {"_input_0": {"quant_dtype": "uint4"}, "weight": {"quant_dtype": "int4"}},
    }
]


def paper(w: torch.Tensor, steps: int) -> torch.Tensor:
    """2 * quantize(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, the rounding straight through."""
    unit = torch.tanh(w) / (2 * torch.tanh(w).abs().max()) + 0.5
    rounded = torch.round(unit * steps) / steps
    return 2 * (unit + (rounded - unit).detach()) - 1


def test_weights_and_their_gradients_are_those_of_the_paper():
    model = net()
    quantizer = calibrated(model, method="dorefa", config_list=LIST)
    for name in ("conv1.weight", "linear.weight"):
        q = quantizer.parameters[name]
        latent = quantizer.context.projection.latent(name).double().requires_grad_()
        wanted = paper(latent, 14)  # int4, restricted: -7..7
        torch.testing.assert_close(model.get_parameter(name).double(), wanted.detach(), atol=1e-6, rtol=1e-6)
        upstream = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        wanted.backward(upstream)
        given = latent.detach().float(), upstream.float()
        found = q.weight_gradient(*given, q.gradient_sums(*given))
        torch.testing.assert_close(found.double(), latent.grad, atol=1e-5, rtol=1e-4)
        assert q.scale.item() == pytest.approx(1 / 7) and int(q.zero_point) == 0
    assert isinstance(model.bn1, torch.nn.BatchNorm2d) and not quantizer.weights.folds  # the norm keeps its magnitude


def test_weights_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.atanh(torch.tensor([[0.5, -0.25, 0.0, 0.2]]))
    entry = {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int3"}
    calibrated(model, torch.randn(2, 4), method="dorefa", config_list=[entry])
    torch.testing.assert_close(model[0].weight.data, torch.tensor([[1.0, -2 / 3, 0.0, 1 / 3]]))  # thirds; -0.5 is a tie


def test_signs_times_the_mean():
    model = net()
    entry = {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "binary"}
    quantizer = calibrated(model, method="dorefa", config_list=[entry])
    latent = quantizer.context.projection.latent("linear.weight")
    torch.testing.assert_close(model.linear.weight.data, latent.sign() * latent.abs().mean())
    grad = torch.randn(4, 6)
    q = quantizer.parameters["linear.weight"]
    assert torch.equal(q.weight_gradient(latent, grad, q.gradient_sums(latent, grad)), grad)


def test_activations_are_bounded_by_zero_and_one():
    quantizer = calibrated(net(), method="dorefa", config_list=LIST)
    q = quantizer.activations["conv1._input_0"]
    x = torch.linspace(-1.01, 2, 301, dtype=torch.float64).requires_grad_()
    bounded = x.clamp(0, 1)
    wanted = bounded + (torch.round(bounded * 15) / 15 - bounded).detach()
    upstream = torch.arange(301.0, dtype=torch.float64)
    wanted.backward(upstream)
    x32 = x.detach().float().requires_grad_()
    out = q(x32)
    out.backward(upstream.float())
    torch.testing.assert_close(out.detach().double(), wanted.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x32.grad.double(), x.grad)


def test_rounded_gradients_are_on_a_grid_of_each_sample_and_right_on_average():
    torch.manual_seed(0)
    grad = torch.randn(3, 50) * torch.tensor([[1.0], [10.0], [0.0]])
    drawn = torch.stack([rounded_gradient(grad, 3) for _ in range(4000)])
    assert drawn.isfinite().all() and drawn[:, 2].abs().max() == 0
    most = grad.abs().amax(1, keepdim=True)[:2]
    level = (drawn[:, :2] / most / 2 + 0.5) * 7
    torch.testing.assert_close(level, level.round(), atol=1e-4, rtol=0)
    inner = grad[:2].abs() < most * (1 - 1 / 7)  # at the ends noise is cut off
    error = (drawn[:, :2].mean(0) - grad[:2]).abs() / most
    assert error[inner].max() < 0.015 and (drawn[0, :2] - grad[:2]).abs().max() > 0.05


def test_gradient_bits_are_those_of_the_backward_pass():
    x = torch.rand(4, 6).requires_grad_()
    grad = torch.randn(4, 6)
    torch.manual_seed(1)
    Bounded.apply(x, x.detach(), 2).backward(grad)
    torch.manual_seed(1)
    assert torch.equal(x.grad, rounded_gradient(grad, 2)) and not torch.equal(x.grad, grad)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"options": {"gradient_bits": 1}}, "gradient_bits=1: must be 2 to 16"),
        ({"config_list": [{"op_types": ["Linear"], "target_names": ["_input_0"], "quant_dtype": "int4"}]}, "uint4"),
        ({"config_list": [{"op_types": ["Linear"], "target_names": ["weight"], "quant_scheme": "affine"}]}, "_restr"),
        ({"config_list": [{"op_types": ["Linear"], "apply_method": "clamp_round"}]}, "a rule of its own"),
        ({"config_list": [{"op_types": ["Conv2d"], "fuse_names": [["conv1", "bn1"]]}]}, "Leave fuse_names out"),
    ],
)
def test_what_does_not_fit(config, said):
    with pytest.raises(UserError, match=said):
        attached(net(), EXAMPLE, method="dorefa", **config)
