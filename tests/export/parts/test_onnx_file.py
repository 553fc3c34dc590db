"""What is done to files of ONNX, on small graphs made by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from dist_compress.export.parts import onnx_file

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 32)).astype(np.float32)


def saved(path, nodes, tensors, shape):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    held = [onnx.numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def output(path, **options):
    given = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(given, name, value)
    given.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(str(path), given, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


@pytest.mark.parametrize("zero", [False, True])
def test_blocks_of_four_bits_become_what_the_kernel_for_few_bits_takes(tmp_path, zero):
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    tensors = {
        "fc.parametrizations.weight.original": RNG.integers(-8, 8, (16, 32)).astype(np.int8),
        "scale": RNG.random((16, 2)).astype(np.float32),
        **({"zero": RNG.integers(-8, 8, (16, 2)).astype(np.int8)} if zero else {}),
    }
    nodes = [
        helper.make_node("DequantizeLinear", list(tensors), ["w"], axis=1, block_size=16),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    saved(path, nodes, tensors, [3, 16])
    before = output(path)
    onnx_file.tidy(path, {"fc.weight": 4})
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node] == ["DequantizeLinear", "MatMul"]
    held = {t.name: t for t in graph.initializer}["fc.weight_t"]
    assert held.data_type == TensorProto.INT4 and len(held.raw_data) == 16 * 32 // 2
    assert torch.equal(onnx_file.integers(path)["fc.weight"], torch.from_numpy(tensors[next(iter(tensors))]))
    np.testing.assert_allclose(output(path, optimized_model_filepath=str(optimized)), before, rtol=1e-5, atol=1e-5)
    assert [node.op_type for node in onnx.load(optimized).graph.node] == ["MatMulNBits"]


@pytest.mark.parametrize("bits", [onnx_file.WIDE, 8])
def test_a_bias_beside_a_wide_weight_is_added_afterwards(tmp_path, bits):
    path = tmp_path / "model.onnx"
    tensors = {
        "weight": RNG.integers(-9, 9, (16, 32)).astype(np.int16), "s": np.float32(0.1), "x.s": np.float32(1e-4),
        "x.z": np.int16(0), "bias": 100 * RNG.random(16).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.s", "x.z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x.s", "x.z"], ["d"]),
        helper.make_node("DequantizeLinear", ["weight", "s"], ["w"]),
        helper.make_node("Gemm", ["d", "w", "bias"], ["y"], transB=1),
    ]
    saved(path, nodes, tensors, [3, 16])
    before = output(path, graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    onnx_file.tidy(path, {"weight": bits})
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds[3:] == (["Gemm", "Add"] if bits == onnx_file.WIDE else ["Gemm"])
    after = output(path, graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
    if bits == onnx_file.WIDE:  # whatever ONNX Runtime optimizes
        np.testing.assert_allclose(output(path), before, rtol=1e-5, atol=1e-5)
