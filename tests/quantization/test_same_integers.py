"""`quantize` against the ones that others have: torchao's bit for bit, ONNX Runtime's but for ties."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from torchao.quantization import quant_primitives

from dist_compress.quantization import dtypes
from dist_compress.quantization.affine import qparams, quantize

COUNT = 200_000


def values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 2


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("name", ["int8", "int4", "uint8"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_torchaos_has_the_same_bits(name, scheme, per_channel):
    dtype, x = dtypes.find(name, scheme, ""), values((20, COUNT // 20))
    block = (1, x.shape[1]) if per_channel else tuple(x.shape)
    low, high = torch.aminmax(x, dim=1, keepdim=True) if per_channel else (x.min().view(1), x.max().view(1))
    scale, zero = qparams(low * 0.8, high * 0.8, dtype, scheme)  # some of it is clipped
    bounds = (dtype.quant_min, dtype.quant_max)
    theirs = quant_primitives.quantize_affine(x, block, scale.flatten(), zero.flatten(), dtype.storage, *bounds)
    ours = quantize(x, scale, zero, dtype)
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    back = quant_primitives.dequantize_affine(theirs, block, scale.flatten(), zero.flatten(), dtype.storage, *bounds)
    assert torch.equal((ours.float() - zero) * scale, back)
    assert not torch.equal(quantize(x, scale * 1.001, zero, dtype), theirs)


@pytest.mark.parametrize(("name", "zero_type"), [("int8", 3), ("uint8", 2)])  # of onnx.TensorProto
def test_onnx_runtimes_differs_by_one_and_on_ties_only(name, zero_type):
    """It divides by the scale where torch multiplies with its reciprocal, which is rounded itself."""
    helper, dtype, x = onnx.helper, dtypes.find(name, "affine", ""), values((COUNT,))
    scale, zero = qparams(x.min() * 0.8, x.max() * 0.8, dtype, "affine")
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])], "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [COUNT])],
        [helper.make_tensor_value_info("q", zero_type, [COUNT])],
        [
            helper.make_tensor("s", onnx.TensorProto.FLOAT, [], [scale.item()]),
            helper.make_tensor("z", zero_type, [], [int(zero)]),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ties = (torch.arange(-100, 100) + 0.5) * scale  # and what lies right beside a tie
    x = torch.cat([x[: COUNT - 600], ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    theirs = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    ours, level = quantize(x, scale, zero, dtype), x.double() / scale.double()
    differ = ours != theirs
    assert 0 < differ.sum() < 200  # of these 200 thousand; almost all are the ties put there
    assert differ[: COUNT - 600].sum() <= 10
    assert (ours.int() - theirs.int()).abs().max() == 1
    from_a_tie = (level - level.floor() - 0.5).abs() / level.abs()
    assert from_a_tie[differ].max() <= 2 * torch.finfo(torch.float32).eps
