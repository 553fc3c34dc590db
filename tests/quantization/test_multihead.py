"""nn.MultiheadAttention: its weights, its hidden layer and the attention inside as targets, delivered and exported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from nets import attached, calibrated  # noqa: E402
from test_calls import calibrated_on, exported, quantized  # noqa: E402

from dist_compress.quantization import describe, rebuild, round_biases  # noqa: E402

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
ATTENTION = {"op_types": ["MultiheadAttention", "NonDynamicallyQuantizableLinear"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        for bias in (self.attention.in_proj_bias, self.attention.out_proj.bias):
            nn.init.normal_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def targets(*entries: dict) -> list[str]:
    settings = attached(net(), X, method="ptq", config_list=[*entries]).settings
    return [setting.path.removeprefix("attention.") for setting in settings]


def test_defaults():
    inputs = [f"_input_{i}" for i in range(3)]
    assert targets(ATTENTION) == [*inputs, "in_proj_weight", "out_proj._input_0", "out_proj.weight"]
    assert targets({"op_types": ["softmax"]}) == ["scaled_dot_product_attention_0.softmax_0._output_0"]
    assert targets({"op_names_re": ["attention.out"], "target_names": ["weight"]}) == ["out_proj.weight"]
    assert targets({"op_types": ["MultiheadAttention"], "method": "round_to_nearest"}) == ["in_proj_weight"]


def by_channel(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def test_the_hidden_layer_by_hand():
    """_input_0 and weight of out_proj, and nothing else; in torch's own forward neither would be seen."""
    entry = {"op_names": ["attention.out_proj"], "options": {"observer": "min_max", "weight_observer": "min_max"}}
    plain, layer = net().requires_grad_(False), net().attention.out_proj
    nn.init.eye_(plain.attention.out_proj.weight)
    nn.init.zeros_(plain.attention.out_proj.bias)
    model = calibrated_on(net(), X, entry)
    model.attention.out_proj.weight.data.copy_(by_channel(layer.weight))  # as the projection leaves it
    wanted = nn.functional.linear(quantized(plain(X)), by_channel(layer.weight), layer.bias)
    torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(net()(X), wanted, atol=1e-4)


def test_weights_alone_are_seen_by_the_fast_path_too():
    model = net()
    entry = {"op_types": ["MultiheadAttention"], "target_names": ["in_proj_weight"], "quant_dtype": "int4"}
    calibrated(model, X, method="ptq", config_list=[entry]).context.projection.project()
    with torch.no_grad():
        fast = model(X)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = model(X)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(fast, slow)
        assert not torch.allclose(fast, net()(X), atol=1e-4)


def test_delivered_and_exported(tmp_path):
    model = net()
    calibrated(model, X, method="ptq", config_list=[ATTENTION, {"op_types": ["matmul"]}]).fold()
    round_biases(model)
    other = Net().eval()
    rebuild(other, json.loads(json.dumps(describe(model))))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X)) and describe(other) == describe(model)
    difference, _, nodes = exported(model, X, tmp_path)
    assert difference["max_diff"] < 8 and difference["top1_agreement"] >= 0.98
    assert difference["num_integers"] == 4 * 8 * 8 + 8  # both weights, and the bias of out_proj
    made_by = {output: node.op_type for node in nodes for output in node.output}
    products = [[made_by.get(name) for name in node.input] for node in nodes if node.op_type == "MatMul"]
    assert products.count(["DequantizeLinear"] * 2) == 2  # the matmuls of attention; other weights are transposed
