"""Programs of torch.export: what they compute, the integers in them, batch sizes, and files that are refused."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "quantization"))
from nets import EXAMPLE, calibrated, net  # noqa: E402

from dist_compress.config import Config  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402
from dist_compress.export import torch_export as format  # noqa: E402
from dist_compress.quantization import round_biases  # noqa: E402
from dist_compress.quantization.convert import integers_of  # noqa: E402

ALL = {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_0", "weight", "_output_0"]}
HELD_OUT = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(8))


def delivered(**config):
    model = net()
    quantizer = calibrated(model, **{"method": "ptq", **config})
    quantizer.fold()
    round_biases(model)
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, model) of an int8 net."""
    folder, model = tmp_path_factory.mktemp("program"), delivered(config_list=[ALL])
    format.export(folder, model, None, Config(), ((EXAMPLE,), {}))
    return folder, model


def test_int8_has_the_bits_of_the_run(exported):
    folder, model = exported
    found = format.check(folder, model, ((HELD_OUT,), {}))
    assert found == {"max_diff": 0.0, "top1_agreement": 1.0, "num_integers": 162 + 6 + 162 + 6 + 24 + 4}
    program = format.load(folder)
    for size in (1, 5):
        assert torch.equal(program(HELD_OUT[:size])["output"], model(HELD_OUT[:size]))
    kinds = [str(node.target) for node in program.graph.nodes]
    assert kinds.count("quantized_decomposed.quantize_per_tensor.default") == 6
    assert kinds.count("quantized_decomposed.dequantize_per_channel.default") == 6
    held = program.state_dict()["conv1.parametrizations.weight.original"]
    assert held.dtype == torch.int8 and torch.equal(held, integers_of(model.conv1.weight, model.conv1.quantizer_weight))


def test_a_program_of_another_model_does_not_ship(exported):
    folder, model = exported
    other = delivered(config_list=[ALL])
    with torch.no_grad():
        other.linear.weight[0, 0] += other.linear.quantizer_weight.scale[0, 0]
    with pytest.raises(RuntimeError, match="integers of linear.weight"):
        format.check(folder, other, ((HELD_OUT,), {}))
    with torch.no_grad():
        other.linear.weight.neg_()
    with pytest.raises(RuntimeError, match="must not ship"):
        format.check(folder, other, ((HELD_OUT,), {}))


@pytest.mark.parametrize(
    ("settings", "operator"),
    [
        ({"_input_0": {"granularity": "per_token", "quant_scheme": "symmetric"}, "weight": {}}, "quantize_per_token"),
        ({"weight": {"quant_dtype": "int4", "granularity": "per_group(3)"}}, "dequantize_per_channel_group"),
        ({"_input_0": {}, "weight": {"granularity": "per_tensor", "quant_dtype": "uint8"}}, "dequantize_per_tensor"),
        ({"_input_0": {"quant_dtype": "fp8_e4m3"}, "weight": {"quant_dtype": "fp8_e4m3"}}, "aten.to.dtype"),
        ({"_input_0": {"granularity": "per_group(3)"}, "weight": {"granularity": [2, 3]}}, "repeat_interleave"),
    ],
)
def test_every_kind_of_scale_and_number(tmp_path, settings, operator):
    model = delivered(config_list=[{"op_types": ["Linear"], "target_settings": settings}])
    format.export(tmp_path, model, None, Config(), ((EXAMPLE,), {}))
    found = format.check(tmp_path, model, ((HELD_OUT,), {}))
    assert found["max_diff"] == 0.0 and found["num_integers"] >= 24
    assert any(operator in str(node.target) for node in format.load(tmp_path).graph.nodes)


def test_a_float_model_and_keyword_arguments(tmp_path):
    class Two(torch.nn.Linear):
        def forward(self, x, *, scale, extra=None):
            return super().forward(x) * scale[:, None], extra

    torch.manual_seed(0)
    model, call = Two(3, 4), ((torch.randn(2, 3),), {"scale": torch.rand(2)})
    format.export(tmp_path, model, None, Config(), call)
    assert format.check(tmp_path, model, ((torch.randn(7, 3),), {"scale": torch.rand(7)})) == {"max_rel_diff": 0.0}


def rewritten(folder, out, change):
    """A copy of the program with one JSON text or member changed: change(name, bytes) -> bytes."""
    with zipfile.ZipFile(folder / format.FILE) as old, zipfile.ZipFile(out / format.FILE, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


def test_what_would_run_as_python_is_refused(exported, tmp_path):
    folder, _ = exported
    assert format.load(rewritten(folder, tmp_path, lambda name, data: data)) is not None
    pickled = lambda name, data: b"pickle" if name.endswith("sample_inputs/model.pt") else data  # noqa: E731
    with pytest.raises(UserError, match="pickled objects"):
        format.load(rewritten(folder, tmp_path, pickled))
    marked = lambda name, data: data.replace(b'"use_pickle": false', b'"use_pickle": true', 1)  # noqa: E731
    with pytest.raises(UserError, match="pickled objects"):
        format.load(rewritten(folder, tmp_path, marked))
    for code in ("__import__('os').getcwd()", "preview(s0)", "Symbol('s77', positive=True).name"):

        def evil(name, data, code=code):
            return data.replace(b"Symbol('s77', positive=True, integer=True)", json.dumps(code)[1:-1].encode())

        with pytest.raises(UserError, match="would run as Python"):
            format.load(rewritten(folder, tmp_path, evil))
    (tmp_path / format.FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="no program of torch.export"):
        format.load(tmp_path)


def test_a_model_that_cannot_be_traced_is_refused_before_training():
    class Branching(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(UserError, match=r"export=\[torch_export\]: torch.export cannot trace Branching"):
        format.ready(Branching(4, 4), {}, ((torch.randn(2, 4),), {}))
