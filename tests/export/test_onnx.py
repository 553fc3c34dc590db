"""ONNX: what ONNX Runtime makes of the file, integers in it, batch sizes, and what cannot be exported."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "quantization"))
from nets import EXAMPLE, calibrated, net  # noqa: E402

from dist_compress.config import Config  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402
from dist_compress.export import onnx as format  # noqa: E402
from dist_compress.quantization import round_biases  # noqa: E402
from dist_compress.quantization.affine import quantize  # noqa: E402
from dist_compress.quantization.dtypes import find  # noqa: E402

ALL = {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_0", "weight", "_output_0"]}
HELD_OUT = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(8))


def delivered(model=None, example=EXAMPLE, **config):
    model = model or net()
    quantizer = calibrated(model, example, **{"method": "ptq", **config})
    quantizer.fold()
    round_biases(model)
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, model) of an int8 net."""
    folder, model = tmp_path_factory.mktemp("onnx"), delivered(config_list=[ALL])
    format.export(folder, model, None, Config(), ((EXAMPLE,), {}))
    return folder, model


def test_int8_runs_and_agrees(exported):
    folder, model = exported
    found = format.check(folder, model, ((HELD_OUT,), {}))
    assert found["max_diff"] <= 2 and found["top1_agreement"] == 1.0  # 2 / 255 of the range of the outputs
    assert found["num_integers"] == 162 + 6 + 162 + 6 + 24 + 4
    graph = onnx.load(folder / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 6 and kinds.count("DequantizeLinear") == 6 + 3 + 3
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert held["conv1.weight"].dtype == np.int8 and held["conv1.bias"].dtype == np.int32
    q = model.conv1.quantizer_weight
    wanted = quantize(model.conv1.weight.detach(), q.scale, q.zero_point, q.spec.dtype)
    assert np.array_equal(held["conv1.weight"], wanted)


def test_narrow_and_channelwise_activations(tmp_path):
    entries = [
        {**ALL, "quant_dtype": "int4"},
        {"op_names": ["conv2"], "target_names": ["_input_0"], "granularity": "per_channel", "quant_dtype": "uint8"},
    ]
    model = delivered(config_list=entries)
    format.export(tmp_path, model, None, Config(), ((EXAMPLE,), {}))
    assert format.check(tmp_path, model, ((HELD_OUT * 5,), {}))["top1_agreement"] == 1.0  # clipped alike


def test_a_float_model_can_be_exported(tmp_path):
    model = net().eval()
    format.export(tmp_path, model, None, Config(), ((EXAMPLE,), {}))
    assert format.check(tmp_path, model, ((HELD_OUT,), {}))["max_rel_diff"] < 1e-5


def test_a_file_of_another_model_does_not_ship(exported):
    folder, model = exported[0], delivered(config_list=[ALL])
    with torch.no_grad():
        model.linear.weight[0, 0] += model.linear.quantizer_weight.scale[0, 0]
    with pytest.raises(RuntimeError, match="integers of linear.weight"):
        format.check(folder, model, ((HELD_OUT,), {}))
    with torch.no_grad():
        model.linear.weight.neg_()
    with pytest.raises(RuntimeError, match="must not ship"):
        format.check(folder, model, ((HELD_OUT,), {}))


KINDS = {
    "floats, blocks, groups": [
        {"op_names": ["conv1"], "target_names": ["_input_0", "weight", "_output_0"], "quant_dtype": "fp8_e5m2"},
        {"op_names": ["conv2"], "target_names": ["weight"], "granularity": [1, 1, 3, 3]},
        {
            "op_names": ["linear"],
            "target_settings": {"_input_0": {"granularity": "per_group(3)"}, "weight": {"granularity": "in_channel"}},
        },
    ],
    "16 bits, 4 bits, tokens": [
        {"op_names": ["conv1", "conv2"], "target_names": ["_input_0", "weight", "_output_0"], "quant_dtype": "int16"},
        {
            "op_names": ["linear"],
            "target_settings": {
                "_input_0": {"granularity": "per_token"},
                "weight": {"quant_dtype": "uint4", "quant_scheme": "affine", "granularity": "per_group(3)"},
            },
        },
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scale_and_number(tmp_path, kind):
    model = delivered(config_list=KINDS[kind])
    format.export(tmp_path, model, None, Config(), ((EXAMPLE,), {}))
    found = format.check(tmp_path, model, ((HELD_OUT * 1.5,), {}))
    assert found["max_diff"] < 0.1 and found["top1_agreement"] == 1.0  # no value on a tie here
    assert found["num_integers"] >= 162 + 162 + 24
    held = {t.name: t for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    if kind.startswith("16"):
        assert held["conv1.weight"].data_type == onnx.TensorProto.INT16
        assert held["linear.weight"].data_type == onnx.TensorProto.UINT4 and len(held["linear.weight"].raw_data) == 12
    else:
        assert held["conv1.weight"].data_type == onnx.TensorProto.FLOAT8E5M2


class Tokens(torch.nn.Module):
    """Embedded tokens, two linear layers without bias, of which the second shares the table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = torch.nn.Embedding(24, 32), torch.nn.Linear(32, 32, bias=False)
        self.head = torch.nn.Linear(32, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return {"logits": self.head(torch.relu(self.inner(self.embed(ids)))), "cache": [None]}


def test_tokens_of_any_number_and_tied_weights(tmp_path):
    """Integers of a shared table are there once."""
    kind = {"quant_dtype": "int4", "granularity": "per_group(16)"}
    entry = {"op_types": ["Linear"], "target_names": ["weight"], **kind}
    ids = torch.arange(10).view(2, 5)
    model = delivered(Tokens(), ids, config_list=[entry])
    format.export(tmp_path, model, None, Config(), ((ids,), {}))
    assert format.check(tmp_path, model, ((torch.arange(21).view(3, 7),), {}))["num_integers"] == 24 * 32 + 32 * 32
    graph = onnx.load(tmp_path / "model.onnx").graph
    held = {t.name: list(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.INT4}
    assert sorted(held) == ["head.weight", "inner.weight_t"]
    assert [o.name for o in graph.output] == ["logits"]


def test_a_model_that_cannot_be_traced_is_refused_before_training():
    class Branching(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(UserError, match=r"export=\[onnx\]: torch.export cannot trace Branching"):
        format.ready(Branching(4, 4), {}, ((torch.randn(2, 4),), {}))


def test_quantize_is_onnx_runtimes_but_for_ties():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 3
    for name, zero, size in (("int8", -7, 0.0312), ("uint8", 131, 0.0312), ("int8", -7, 0.03125)):
        dtype = find(name, "affine", "")
        scale = torch.tensor([size])
        kind = onnx.TensorProto.INT8 if name == "int8" else onnx.TensorProto.UINT8
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])], "q",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])],
            [onnx.helper.make_tensor_value_info("y", kind, [None])],
            [onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT, [], [scale.item()]),
             onnx.helper.make_tensor("z", kind, [], [zero])],
        )  # fmt: skip
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        wanted = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        found = quantize(x, scale, torch.tensor([zero], dtype=torch.int32), dtype)
        other = found != wanted  # ONNX Runtime divides by the scale, torch multiplies with its reciprocal: ties differ
        level = (x.double() / scale.double())[other]
        assert other.sum() <= 3 and ((level - level.floor() - 0.5).abs() < 1e-4).all()
        assert not other.any() or scale.item() != 0.03125
