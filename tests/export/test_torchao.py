"""torchao: its tensors hold the integers and scales of the run, compute what it computed, and come back from a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "quantization"))
from nets import EXAMPLE, calibrated, net  # noqa: E402

pytest.importorskip("torchao")

from dist_compress.config import Config  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402
from dist_compress.export import torchao as format  # noqa: E402
from dist_compress.quantization import round_biases  # noqa: E402
from dist_compress.quantization.convert import integers_of  # noqa: E402

IDS = torch.arange(10).view(2, 5)
SYMMETRIC = {"quant_dtype": "int8", "quant_scheme": "symmetric"}


class Tokens(nn.Module):
    """A table, two linear layers, of which the second shares it, and a parameter and a buffer of the model's own."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(24, 32), nn.Linear(32, 32)
        self.head, self.shift = nn.Linear(32, 24, bias=False), nn.Parameter(torch.randn(32))
        self.register_buffer("factor", torch.tensor(1.5))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.relu(self.inner(self.embed(ids) + self.shift)) * self.factor)


def delivered(model, example, *entries, **config):
    calibrated(model, example, method="ptq", config_list=list(entries), **config).fold()
    round_biases(model)
    return model.eval()


def entry(weight, source=None):
    settings = {"weight": weight, **({"_input_0": source} if source is not None else {})}
    return {"op_types": ["Linear"], "target_names": list(settings), "target_settings": settings}


GROUPS = {"quant_dtype": "int4", "granularity": "per_group(16)"}
KINDS = {
    "int8": (entry({}), "Int8Tensor", 1e-3),
    "int8, groups": (entry({"granularity": "per_group(16)"}), "Int8Tensor", 1e-3),
    "int8, inputs per token": (entry({}, {"granularity": "per_token", **SYMMETRIC}), "Int8Tensor", 0.1),
    "int8, inputs per token, affine": (entry({}, {"granularity": "per_token"}), "Int8Tensor", 0.1),
    "int8, inputs as by default": (entry({}, {}), "Int8Tensor", 0.1),
    "int4, groups": (entry(GROUPS), "IntxUnpackedToInt8Tensor", 1e-3),
    "int4, groups, inputs per token": (entry(GROUPS, {"granularity": "per_token"}), "IntxUnpackedToInt8Tensor", 0.1),
    "int6, affine": (entry({"quant_dtype": "int6", "quant_scheme": "affine"}), "IntxUnpackedToInt8Tensor", 1e-3),
    "fp8": (entry({"quant_dtype": "fp8_e4m3"}), "Float8Tensor", 1e-3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_torchao_computes(tmp_path, kind):
    wanted, name, most = KINDS[kind]
    model = delivered(Tokens(), IDS, wanted)
    held_out = ((torch.randint(24, (40, 7), generator=torch.Generator().manual_seed(1)),), {})
    format.export(tmp_path, model, None, Config(), ((IDS,), {}))
    found = format.check(tmp_path, model, held_out)
    biases = 32 if kind == "int8, inputs as by default" else 0  # rounded where the input has one scale
    assert found["max_diff"] <= most and found["num_integers"] == 24 * 32 + 32 * 32 + biases
    loaded = format.load(tmp_path, Tokens())
    assert type(loaded.inner.weight).__name__ == name
    assert loaded.head.weight is loaded.embed.weight and torch.equal(loaded.shift, model.shift)
    q = model.inner.quantizer_weight
    assert torch.equal(loaded.inner.weight.qdata.float(), integers_of(model.inner.weight, q).float())
    assert torch.equal(loaded.inner.weight.scale.flatten(), q.scale.flatten())
    with safe_open(tmp_path / format.FILE, "pt") as file:
        assert "embed._weight_qdata" in file.keys() and "head._weight_qdata" not in file.keys()  # noqa: SIM118


def test_products_of_8_bit_floats_are_not_run_on_a_cpu(tmp_path, caplog):
    kind = {"quant_dtype": "fp8_e4m3"}
    model = delivered(Tokens(), IDS, entry(kind, {"granularity": "per_token", **kind}))
    format.export(tmp_path, model, None, Config(), ((IDS,), {}))
    found = format.check(tmp_path, model, ((IDS,), {}))
    assert found == {"num_integers": 24 * 32 + 32 * 32, "kernels": format.NOT_RUN} and "NOT RUN" in caplog.text


def test_convolutions_keep_float_inputs(tmp_path):
    model = delivered(net(), EXAMPLE, {"op_types": ["Conv2d"], "target_names": ["weight"]})
    format.export(tmp_path, model, None, Config(), ((EXAMPLE,), {}))
    assert format.check(tmp_path, model, ((EXAMPLE,), {}))["max_diff"] < 1e-3


def test_a_file_of_another_model_does_not_ship(tmp_path):
    model = delivered(Tokens(), IDS, entry({}))
    format.export(tmp_path, model, None, Config(), ((IDS,), {}))
    with torch.no_grad():
        model.inner.weight[0, 0] += model.inner.quantizer_weight.scale[0, 0]
    with pytest.raises(RuntimeError, match="integers of inner.weight"):
        format.check(tmp_path, model, ((IDS,), {}))
    with torch.no_grad():
        model.inner.weight[0, 0] -= model.inner.quantizer_weight.scale[0, 0]
        model.inner.weight *= 1 + 1e-5  # the same integers, another scale
        model.inner.quantizer_weight.scale *= 1 + 1e-5
    with pytest.raises(RuntimeError, match="what torchao makes of the integers of inner.weight"):
        format.check(tmp_path, model, ((IDS,), {}))
    with pytest.raises(UserError, match="does not fit"):
        format.load(tmp_path, nn.Linear(3, 3))
    with pytest.raises(UserError, match="no such file"):
        format.load(tmp_path / "elsewhere", Tokens())


@pytest.mark.parametrize(
    ("model", "example", "wanted", "said"),
    [
        (net, EXAMPLE, {"op_types": ["Conv2d"]}, "inputs of Linear only, not of Conv2d"),
        (net, EXAMPLE, {"op_types": ["Linear"], "target_names": ["_output_0"]}, "only weights, and inputs of layers"),
        (Tokens, IDS, entry({"quant_dtype": "uint4"}), "signed integers"),
        (Tokens, IDS, entry(GROUPS, {}), "beside such a weight it takes per_token affine"),
        (Tokens, IDS, entry({}, {"quant_dtype": "int6"}), "takes all of int8 or uint8"),
    ],
)
def test_what_torchao_cannot_hold_is_refused_before_training(model, example, wanted, said):
    from dist_compress.config import QuantizationConfig
    from dist_compress.quantization import Quantizer

    built, config = model(), Config(quantization=QuantizationConfig(method="ptq", config_list=[wanted]))
    targets = Quantizer(config).foresee(built, ((example,), {}))
    with pytest.raises(UserError, match=said):
        format.ready(built, targets, ((example,), {}))


def test_torchao_needs_something_quantized_and_to_be_there(monkeypatch):
    with pytest.raises(UserError, match="nothing is quantized"):
        format.ready(net(), {}, ((EXAMPLE,), {}))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"pip install 'dist_compress\[torchao\]'"):
        format.ready(net(), {}, ((EXAMPLE,), {}))
