"""Calls of functions as targets: values by hand, the same scales on any number of ranks, what is delivered, ONNX."""

from __future__ import annotations

import collections
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))  # also in the workers of the pool
from nets import EXAMPLE, attached, calibrated, net  # noqa: E402

from dist_compress import comm  # noqa: E402
from dist_compress.config import Config  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402
from dist_compress.models.resnet_cifar import resnet20  # noqa: E402
from dist_compress.quantization import describe, rebuild, round_biases  # noqa: E402

LAYERS = {"op_types": ["Conv2d", "Linear"]}
ADD = {"op_types": ["add"]}


class Attention(nn.Module):
    """x -> attention of x to itself, plus x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.scaled_dot_product_attention(x, x, x)
        return self.linear(torch.cat([x, -x], -1)[..., 2:6])


def quantized(x: torch.Tensor, levels: int = 255) -> torch.Tensor:
    """As by hand: affine, the range is that of `x` with 0."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / levels
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, levels).sub(zero) * scale


def calibrated_on(model: nn.Module, x: torch.Tensor, *entries: dict) -> nn.Module:
    """Calibrated on nothing but `x`, with min and max."""
    quantizer = attached(model, x, method="ptq", options={"observer": "min_max"}, config_list=list(entries))
    quantizer.observed.calibrating = True
    with torch.no_grad():
        model.eval()(x)
    quantizer.observed.count_pass()
    quantizer.observed.end_step()
    quantizer.observed.calibrating = False
    quantizer.begin()
    return model


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))


def test_both_inputs_of_an_addition_by_hand():
    model = calibrated_on(Attention(), X, ADD, {"op_types": ["cat"], "target_names": ["_output_0"]})
    inner = F.scaled_dot_product_attention(X, X, X)
    y = quantized(X) + quantized(inner)
    exact = X + inner
    wanted = model.linear(quantized(torch.cat([y, -y], -1))[..., 2:6])
    bound = torch.cat([exact, -exact], -1).abs().max() / 100  # the range of cat was seen before anything was quantized
    torch.testing.assert_close(model(X), wanted, atol=float(bound), rtol=0)
    seen = []
    model.add_0.register_forward_hook(lambda _, operands, output: seen.append(output))
    model(X)
    torch.testing.assert_close(seen[0], y, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(seen[0], exact, atol=1e-4)  # it is quantized


def test_attention_and_its_softmax_by_hand():
    name = "scaled_dot_product_attention"
    outside = calibrated_on(Attention(), X, {"op_types": [name]}).eval()
    wanted = F.scaled_dot_product_attention(*[quantized(X)] * 3)
    torch.testing.assert_close(outside(X), outside.linear((X + wanted).repeat(1, 1, 2)[..., 2:6] * _signs()))
    inside = calibrated_on(Attention(), X, {"op_types": ["softmax"]})
    weights = quantized(torch.softmax(X @ X.mT / 2, -1))
    torch.testing.assert_close(inside(X), inside.linear((X + weights @ X).repeat(1, 1, 2)[..., 2:6] * _signs()))
    assert set(inside.scaled_dot_product_attention_0._modules) == {"softmax_0"}
    assert not outside.scaled_dot_product_attention_0._modules.keys() & {"softmax_0", "matmul_0"}


def _signs() -> torch.Tensor:
    return torch.tensor([1.0, 1.0, -1.0, -1.0])


def targets(*entries: dict) -> list[str]:
    return [s.path for s in attached(Attention(), X, method="ptq", config_list=list(entries)).settings]


def test_defaults_and_selection():
    attention = "scaled_dot_product_attention_0"
    assert targets({"op_types": ["Linear"]}) == ["linear._input_0", "linear.weight"]  # no call unless it is asked for
    assert targets(ADD, LAYERS | {"op_types": ["Linear"]}) == [
        "linear._input_0", "linear.weight", "add_0._input_0", "add_0._input_1",
    ]  # fmt: skip
    assert targets({"op_types": ["softmax"]}) == [f"{attention}.softmax_0._output_0"]
    assert targets({"op_types": ["scaled_dot_product_attention"]}) == [f"{attention}._input_{i}" for i in range(3)]
    assert targets({"op_names": [f"{attention}.matmul_1"], "target_names": ["_output_0"]}) == [
        f"{attention}.matmul_1._output_0"
    ]
    assert targets({"op_names": ["cat_0"], "target_settings": {"_input_1": {"quant_dtype": "int8"}}}) == [
        "cat_0._input_0", "cat_0._input_1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"op_types": ["mul"]}, r"'mul' is no call that the model makes. It calls add \(1: add_0\); matmul \(2: "),
        ({"op_names": ["add_1"]}, "'add_1' is no call that the model makes. It calls add"),
        ({"op_types": ["add"], "target_names": ["_input_2"]}, "they have _input_0, _input_1, _output_0"),
        ({"op_types": ["add"], "target_names": ["weight"]}, "no selected module has a parameter 'weight'"),
        ({"op_types": ["ad"]}, "'ad' matches no module"),
    ],
)
def test_refused(entry, said):
    with pytest.raises(UserError, match=said):
        targets(entry)


def test_another_number_of_calls_is_said_with_the_module():
    model = calibrated_on(Attention(), X, ADD)
    model.forward.previous = lambda x: x
    with pytest.raises(UserError, match="the model: its forward calls add 0 times, but 1 times on the example input"):
        model(X)


def marks() -> list[str]:
    """Fingerprints of the scales through calibration and two steps of training."""
    quantizer = attached(net(), method="qat", config_list=[LAYERS, ADD])
    model, found = quantizer.context.model, []
    quantizer.observed.calibrating = True
    for step in range(4):
        model.train(step > 1)
        for norm in (model.bn1, model.bn2):
            norm.momentum = 0.0
        for j in range(comm.rank(), 6, comm.world_size()):
            model(EXAMPLE * (1 + j + step))
            quantizer.observed.count_pass() if step < 2 else quantizer.after_backward(step, j)
        if step < 2:
            quantizer.observed.end_step()
        if step == 1:
            quantizer.observed.calibrating = False
            quantizer.begin()
        if step > 1:
            quantizer.after_step(step)
            quantizer.context.projection.restore()
            quantizer.context.projection.project()
            found.append(quantizer.fingerprint())
    return [*found, *(str(q.scale.tolist()) for path, q in quantizer.activations.items() if "add_0" in path)]


def test_scales_are_the_same_on_any_number_of_ranks(ranks):
    one = ranks(1, marks)[0]
    assert len(one) == 4 and len(set(one)) == 4
    for n in (2, 3, 4):
        assert all(found == one for found in ranks(n, marks))


def delivered(model: nn.Module, x: torch.Tensor, *entries: dict) -> nn.Module:
    calibrated(model, x, method="ptq", config_list=list(entries)).fold()
    round_biases(model)
    return model.eval()


def test_a_description_rebuilds_the_calls():
    entries = [ADD, {"op_types": ["softmax", "cat"]}, {"op_names": ["linear"]}]
    model = delivered(Attention(), X, *entries)
    description = json.loads(json.dumps(describe(model)))
    assert description["calls"][0] == ["add_0", "add", 1] and len(description["calls"]) == 4
    other = Attention()
    rebuild(other, description)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(X), model(X)) and describe(other) == description
    assert {"add_0.quantizer_input_1.scale", "cat_0.quantizer_input_0.scale"} <= model.state_dict().keys()
    twin = copy.deepcopy(other)
    twin.add_0.quantizer_input_0.scale.mul_(50)
    assert not torch.equal(twin(X), model(X)) and torch.equal(other(X), model(X))
    del description["calls"]  # of a file from before there were calls
    description["quantizers"] = [q for q in description["quantizers"] if q["module"] == "linear"]
    rebuild(Attention(), description)


def exported(model: nn.Module, x: torch.Tensor, folder: Path) -> tuple[dict[str, float], collections.Counter, list]:
    """(difference from ONNX Runtime, the operators that it runs, the nodes of the file)."""
    import onnx
    import onnxruntime

    from dist_compress.export import onnx as onnx_export

    onnx_export.export(folder, model, None, Config(), ((x,), {}))
    difference = onnx_export.check(folder, model, ((torch.randn(64, *x.shape[1:]),), {}))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    runs = collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    return difference, runs, list(onnx.load(folder / "model.onnx").graph.node)


def warm_resnet20(x: torch.Tensor) -> nn.Module:
    """With statistics of some batches."""
    torch.manual_seed(0)
    model = resnet20().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *x.shape[1:]))
    return model


@pytest.mark.parametrize("outputs", [False, True])
def test_residual_blocks_run_in_integers(tmp_path, outputs):
    """Six of nine additions of resnet20, or with their outputs all of them; every convolution."""
    x = torch.randn(4, 3, 16, 16)
    model = warm_resnet20(x)
    add = ADD | {"target_names": ["_input_0", "_input_1", *(["_output_0"] if outputs else [])]}
    difference, runs, nodes = exported(delivered(model, x, LAYERS, add), x, tmp_path)
    assert difference["max_diff"] < 8 and difference["top1_agreement"] >= 0.98
    assert runs["QLinearConv"] == 19 and runs["QLinearAdd"] == (9 if outputs else 6)
    made_by = {output: node.op_type for node in nodes for output in node.output}
    for node in nodes:
        if node.op_type == "Add":
            assert [made_by[name] for name in node.input] == ["DequantizeLinear"] * 2
            readers = {reader.op_type for reader in nodes if node.output[0] in reader.input}
            assert readers == {"QuantizeLinear" if outputs else "Relu"}


def test_without_the_additions_they_run_in_floating_point(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    _, runs, _ = exported(delivered(warm_resnet20(x), x, LAYERS), x, tmp_path)
    assert runs["QLinearAdd"] == 0


class InPlace(nn.Module):
    """As torchvision writes a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv1(x))
        out = self.conv2(x)
        out += x
        out = self.relu(out)
        return self.linear(out.mean((2, 3)))


def test_additions_in_place_are_exported_as_well(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = delivered(InPlace(), x, LAYERS, ADD | {"target_names": ["_input_0", "_input_1", "_output_0"]})
    difference, runs, _ = exported(model, x, tmp_path)
    assert difference["max_diff"] < 2 and runs["QLinearConv"] == 2 and runs["QLinearAdd"] == 1


def test_attention_in_steps_is_exported(tmp_path):
    torch.manual_seed(0)
    entries = [{"op_types": ["matmul", "cat", "add"]}, {"op_types": ["Linear"]}]
    difference, _, nodes = exported(delivered(Attention(), X, *entries), X, tmp_path)
    assert difference["max_diff"] < 8 and difference["top1_agreement"] >= 0.98
    made_by = {output: node.op_type for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type == "MatMul"][:2]
    assert [[made_by[name] for name in node.input] for node in products] == [["DequantizeLinear"] * 2] * 2
    # Of matmul (2 x 2), cat (2), add (2), linear (1); three of them are x, which the file quantizes once.
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) == 2 * 2 + 2 + 2 + 1 - 2
