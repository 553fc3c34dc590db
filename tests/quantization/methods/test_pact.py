"""Learned clipping: gradients against autograd, the decay, first values, signed dtypes."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, attached, calibrated, net
from torch.nn import functional as F

from dist_compress.errors import UserError
from dist_compress.quantization import dtypes
from dist_compress.quantization.methods.pact import LearnedClip, gradients

LIST = [{"op_types": ["Linear"], "target_settings": {"_input_0": {"quant_dtype": "uint4"}, "weight": {}}}]


def by_autograd(x: torch.Tensor, clip: torch.Tensor, bits: int) -> torch.Tensor:
    """Equations 1 and 2 of the paper, the rounding straight through."""
    y = 0.5 * (x.abs() - (x - clip).abs() + clip)
    quantized = torch.round(y * (2**bits - 1) / clip) * clip / (2**bits - 1)
    return y + (quantized - y).detach()


@pytest.mark.parametrize("clip_shape", [(1,), (1, 5)])
def test_gradients_equal_autograd(clip_shape):
    dtype = dtypes.find("uint4", "affine", "")
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 5, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    clip = (torch.rand(clip_shape, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    wanted = by_autograd(x, clip, 4)
    wanted.backward(upstream)
    x32, clip32 = x.detach().float().requires_grad_(), clip.detach().float().requires_grad_()
    zero = torch.zeros(clip_shape, dtype=torch.int32)
    out = LearnedClip.apply(x32, clip32, clip32.detach() / 15, zero, dtype)
    torch.testing.assert_close(out.double(), wanted.detach(), atol=1e-5, rtol=1e-5)
    out.backward(upstream.float())
    torch.testing.assert_close(x32.grad.double(), x.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(clip32.grad.double(), clip.grad, atol=1e-4, rtol=1e-4)
    assert 0.2 < (x.grad == 0).float().mean() < 0.9


def test_values_by_hand():
    x, clip = torch.tensor([-1.0, 0.0, 0.5, 2.0, 3.0]), torch.tensor([2.0])
    of_x, of_clip = gradients(x, clip, torch.ones(5), dtypes.find("uint2", "affine", ""))
    assert of_x.tolist() == [0, 1, 1, 0, 0] and of_clip.tolist() == [0, 0, 0, 1, 1]
    of_x, of_clip = gradients(torch.tensor([-3.0, -1.0, 3.0]), clip, torch.ones(3), dtypes.DTYPES["int8"])
    assert of_x.tolist() == [0, 1, 0]
    torch.testing.assert_close(of_clip, torch.tensor([-128 / 127, 0.0, 1.0]))  # where a signed range begins


def test_clip_begins_at_the_largest_value_and_decays():
    model = net()
    quantizer = calibrated(model, method="pact", options={"decay": 0.25}, config_list=LIST)
    source = quantizer.activations["linear._input_0"]
    _, high = attached_extent()
    torch.testing.assert_close(source.clip.detach(), high)
    torch.testing.assert_close(source.scale, high / 15)
    assert quantizer.undecayed() == ["linear.quantizer_input_0.clip"]
    F.cross_entropy(model.train()(EXAMPLE), torch.arange(2)).backward()
    before = source.clip.grad.clone()
    quantizer.before_step(0)
    torch.testing.assert_close(source.clip.grad, before + 0.25 * source.clip.detach())
    with torch.no_grad():
        source.clip.fill_(3.0)
    quantizer.after_step(0)
    assert source.scale.item() == pytest.approx(0.2) and int(source.zero_point) == 0
    quantizer.fold()
    assert not list(source.parameters()) and source.scale.item() == pytest.approx(0.2)


def attached_extent() -> tuple[torch.Tensor, torch.Tensor]:
    """What the same calibration shows an observer of the extent."""
    options = {"observer": "min_max"}
    quantizer = calibrated(net(), method="ptq", options=options, config_list=LIST)
    source = quantizer.activations["linear._input_0"]
    return source.scale * 0, source.scale * 15


def test_negative_values_that_are_cut_off_are_told():
    quantizer = calibrated(net(), method="pact")
    (line,) = [line for line in quantizer.notes() if "conv1._input_0" in line]
    assert "uint8 begins there" in line and "lsq_plus" in line
    signed = [{"op_types": ["Conv2d"], "target_settings": {"_input_0": {"quant_dtype": "int8"}}}]
    assert calibrated(net(), method="pact", config_list=signed).notes() == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"options": {"decay": -1}}, "decay=-1"),
        ({"options": {"alpha": 1}}, "quantization.options.alpha"),
        ({"config_list": [{"op_types": ["Linear"], "granularity": "per_token"}]}, "neither per_token nor fp8"),
    ],
)
def test_bad_options(config, said):
    with pytest.raises(UserError, match=said):
        attached(net(), method="pact", **config)
