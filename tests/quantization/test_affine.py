"""Affine quantization against torch's own functions, bit for bit, and against numbers by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - defines torch.ops.quantized_decomposed
from torch.ao.quantization.observer import MinMaxObserver

from dist_compress.errors import UserError
from dist_compress.quantization import affine, dtypes

INTEGERS = [name for name, dtype in dtypes.DTYPES.items() if dtype.is_integer]
RANGES = [(-1.0, 3.0), (0.5, 3.0), (-3.0, -0.25), (0.0, 0.0), (-1e-9, 1e-9), (-7.25, 7.25), (0.0, 255.0), (-1e6, 3.0)]


def tensor(seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Normal values, ties, zeros of both signs, tiny and huge numbers."""
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) * spread
    x[0, :8] = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.5, 1e-30, 1e30, -1e30])
    return x


def test_qparams_by_hand():
    int8 = dtypes.find("int8", "affine", "")
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    scale, zero = affine.qparams(low, high, int8, "affine")
    assert (scale.item(), zero.item()) == (torch.tensor(4 / 255).item(), -64)
    scale, zero = affine.qparams(low, high, int8, "symmetric")
    assert (scale.item(), zero.item()) == (torch.tensor(3 / 127.5).item(), 0)
    restricted = dtypes.find("int8", "symmetric_restricted", "")
    assert (restricted.quant_min, restricted.quant_max) == (-127, 127)
    scale, zero = affine.qparams(low, high, restricted, "symmetric_restricted")
    assert (scale.item(), zero.item()) == (torch.tensor(3 / 127).item(), 0)
    scale, zero = affine.qparams(low, high, dtypes.find("uint8", "symmetric", ""), "symmetric")
    assert zero.item() == 128


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize(("name", "torchs"), [("int8", torch.qint8), ("uint8", torch.quint8)])
def test_qparams_are_those_of_torchs_observer(name, torchs, scheme):
    dtype = dtypes.find(name, scheme, "")
    qscheme = torch.per_tensor_affine if scheme == "affine" else torch.per_tensor_symmetric
    for low, high in RANGES:
        observer = MinMaxObserver(dtype=torchs, qscheme=qscheme)
        observer(torch.tensor([low, high]))
        scale, zero = affine.qparams(torch.tensor(low), torch.tensor(high), dtype, scheme)
        wanted_scale, wanted_zero = observer.calculate_qparams()
        assert torch.equal(scale.reshape(1), wanted_scale) and int(zero) == int(wanted_zero), (low, high)


@pytest.mark.parametrize("name", INTEGERS)
def test_per_tensor_has_the_bits_of_torch(name):
    for scheme, (low, high) in itertools.product(("affine", "symmetric"), RANGES):
        dtype = dtypes.find(name, scheme, "")
        scale, zero = affine.qparams(torch.tensor([low]), torch.tensor([high]), dtype, scheme)
        for x in (tensor(), tensor(1, 0.01)):
            x = x.clamp(-1e8, 1e8) if scale > 0.01 else x.clamp(-100, 100)  # torch rounds through int64
            wanted = torch.fake_quantize_per_tensor_affine(x, scale, zero, dtype.quant_min, dtype.quant_max)
            found = affine.fake_quantize(x, scale, zero, dtype)
            assert torch.equal(found, wanted)
            assert torch.equal(affine.dequantize(affine.quantize(x, scale, zero, dtype), scale, zero), wanted)
            assert not torch.equal(found, affine.fake_quantize(x, scale * 1.01, zero, dtype))


@pytest.mark.parametrize("name", ["int4", "int8", "uint8"])
def test_per_channel_has_the_bits_of_torch(name):
    for scheme in ("affine", "symmetric"):
        dtype = dtypes.find(name, scheme, "")
        x = tensor().clamp(-100, 100)
        scale, zero = affine.qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True) * 0.7, dtype, scheme)
        wanted = torch.fake_quantize_per_channel_affine(
            x, scale.flatten(), zero.flatten(), 0, dtype.quant_min, dtype.quant_max
        )
        assert torch.equal(affine.fake_quantize(x, scale, zero, dtype), wanted)
        stored = torch.ops.quantized_decomposed.quantize_per_channel(
            x, scale.flatten(), zero.flatten(), 0, dtype.quant_min, dtype.quant_max, dtype.storage
        )
        assert torch.equal(affine.quantize(x, scale, zero, dtype), stored)


def test_every_range_holds_zero_exactly():
    for name, scheme, (low, high) in itertools.product(INTEGERS, ("affine", "symmetric"), RANGES):
        dtype = dtypes.find(name, scheme, "")
        scale, zero = affine.qparams(torch.tensor(low), torch.tensor(high), dtype, scheme)
        assert affine.fake_quantize(torch.zeros(1), scale, zero, dtype).item() == 0
        assert dtype.quant_min <= zero <= dtype.quant_max


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("num_scales", [1, 6])
def test_gradients_are_straight_through(masked, num_scales):
    dtype = dtypes.find("int4", "affine", "")
    scale, zero = torch.full((num_scales, 1), 0.2), torch.full((num_scales, 1), -2, dtype=torch.int32)
    x = tensor().clamp(-100, 100).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    affine.simulate(x, scale, zero, dtype, masked).backward(upstream)
    reference = x.detach().clone().requires_grad_()
    soft = reference / scale + zero  # autograd of clamp, with rounding as the identity
    value = soft.round().detach() + (soft - soft.detach())
    inside = (value >= -8) & (value <= 7)  # the gradient of torch.clamp at its ends is a matter of taste
    kept = torch.where(inside, value, value.detach()) if masked else value
    ((kept - zero) * scale).backward(upstream)
    torch.testing.assert_close(x.grad, reference.grad)
    share = (x.grad == 0).float().mean()
    assert (0.2 < share < 0.9) if masked else share == 0


def test_eight_bit_floats_are_torchs_casts():
    for name, kind in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        dtype = dtypes.find(name, "symmetric", "")
        x = tensor().clamp(-30, 30)
        scale, zero = affine.qparams(x.min(), x.max(), dtype, "symmetric")
        wanted = (x * (1.0 / scale)).to(kind).float() * scale
        assert torch.equal(affine.fake_quantize(x, scale, zero, dtype), wanted)
        assert affine.quantize(x, scale, zero, dtype).dtype == kind
        assert affine.fake_quantize(x * 100, scale, zero, dtype).abs().max() <= 30.01  # saturates, no inf


@pytest.mark.parametrize(
    ("name", "scheme", "said"),
    [
        ("int9", "affine", "int9"),
        ("int8", "log", "log"),
        ("uint8", "symmetric_restricted", "only signed"),
        ("fp8_e4m3", "affine", "no zero point"),
    ],
)
def test_pairs_that_do_not_exist(name, scheme, said):
    with pytest.raises(UserError, match=said):
        dtypes.find(name, scheme, "quantization.config_list[0]")
