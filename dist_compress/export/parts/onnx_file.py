"""What is done to a file of ONNX after torch's exporter wrote it: names, small integers, layouts. Everything is local.

    conv1.weight    an initializer has the name of the parameter
    INT4, UINT4     integers of at most 4 bits, two to a byte
    fc.weight_t     blocks of a matrix [k, n] instead of [n, k], as the kernels for MatMul with few bits want it

ONNX Runtime rounds a float bias beside a quantized weight to int32 in units of (scale of the input) * (scale of the
weight), which overflows where those have 16 bits or are floats: there the bias is added afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TRANSPOSED = "_t"
WIDE = 99  # bits of a dtype that has more than 8, or is a float


def tidy(path: Path, bits: Mapping[str, int]) -> None:
    """In place. `bits`: of the parameters that are quantized, biases of int32 too."""
    import onnx

    model = onnx.load(path)
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        part.ClearField("metadata_props")  # where in the code of the model it comes from: more than half of the file
    _name_parameters(model.graph)
    _add_biases(model.graph, {name for name, n in bits.items() if n == WIDE})
    _transpose_blocks(model.graph, set(bits))
    narrow = {name + end for name, n in bits.items() if n <= 4 for end in ("", TRANSPOSED)}
    _pack(model.graph, narrow)
    onnx.save(model, path)


def integers(path: Path) -> dict[str, torch.Tensor]:
    """{name of a parameter: its integers, those of 4 bits as int8}; float tensors are in it, too."""
    import onnx

    found = {}
    for tensor in onnx.load(path).graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if kind in ("INT4", "UINT4"):
            values = values.astype(kind.lower().replace("4", "8"))
        if kind in _FLOAT8:
            held = torch.from_numpy(values.view("uint8").copy()).view(_FLOAT8[kind])
        else:
            held = torch.from_numpy(values.copy())
        found[tensor.name] = held
        if tensor.name.endswith(TRANSPOSED):
            found[tensor.name.removesuffix(TRANSPOSED)] = held.t()
    return found


_FLOAT8 = {"FLOAT8E4M3FN": torch.float8_e4m3fn, "FLOAT8E5M2": torch.float8_e5m2}


def _name_parameters(graph: Any) -> None:
    names = {}
    for tensor in graph.initializer:
        names[tensor.name] = tensor.name.replace(".parametrizations", "").removesuffix(".original")
        tensor.name = names[tensor.name]
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)


def _readers(graph: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _add_biases(graph: Any, wide: set[str]) -> None:
    """Conv, ConvTranspose and Gemm of a wide weight without their bias, then Add."""
    import onnx

    held = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    for at, node in reversed(list(enumerate(graph.node))):
        weight = makers.get(node.input[1]) if len(node.input) == 3 else None
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or weight is None or node.input[2] not in held:
            continue
        if weight.op_type == "DequantizeLinear" and weight.input[0] in wide:
            bias = held[node.input[2]]
            if node.op_type != "Gemm":
                bias.dims.extend([1] * (len(held[weight.input[0]].dims) - 2))
            before = f"{node.output[0]}_without_bias"
            graph.node.insert(at + 1, onnx.helper.make_node("Add", [before, bias.name], [node.output[0]]))
            node.output[0] = before
            del node.input[2]


def _transpose_blocks(graph: Any, names: set[str]) -> None:
    """DequantizeLinear along dim 1, then Transpose: DequantizeLinear along dim 0 of the transposed integers."""
    import onnx

    held, readers = {tensor.name: tensor for tensor in graph.initializer}, _readers(graph)
    for node in [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in names]:
        after, given = readers.get(node.output[0], []), list(node.input)
        attributes = {a.name: a for a in node.attribute}
        blocked = attributes["block_size"].i > 0 if "block_size" in attributes else False
        fits = blocked and attributes["axis"].i == 1 and len(held[given[0]].dims) == 2
        if not fits or len(after) != 1 or after[0].op_type != "Transpose":
            continue
        if any(name not in held or len(readers[name]) > 1 for name in given if name):
            continue
        for i, name in enumerate(given):
            if name:
                values = onnx.numpy_helper.to_array(held[name])
                node.input[i] = f"{name}{TRANSPOSED}"
                held[name].CopyFrom(onnx.numpy_helper.from_array(values.T.copy(), node.input[i]))
        attributes["axis"].i = 0
        node.output[0] = after[0].output[0]
        graph.node.remove(after[0])


def _pack(graph: Any, narrow: set[str]) -> None:
    """int8 and uint8 that hold at most 4 bits as INT4 and UINT4, with their zero points."""
    import onnx

    held, readers = {tensor.name: tensor for tensor in graph.initializer}, _readers(graph)
    for name in narrow & set(held):
        nodes = readers[name]
        if any(node.op_type != "DequantizeLinear" or node.input[0] != name for node in nodes):
            continue
        zero_points = {node.input[2] for node in nodes if len(node.input) > 2 and node.input[2]}
        if any(len(readers[z]) != len(nodes) or z not in held for z in zero_points):
            continue
        for own in {name, *zero_points}:
            values = onnx.numpy_helper.to_array(held[own])
            kind = onnx.TensorProto.INT4 if values.dtype == "int8" else onnx.TensorProto.UINT4
            low_first = values.astype("uint8").flatten() & 15
            low_first.resize(-(-values.size // 2) * 2)
            packed = (low_first[::2] | low_first[1::2] << 4).tobytes()
            held[own].CopyFrom(onnx.helper.make_tensor(own, kind, values.shape, packed, raw=True))
