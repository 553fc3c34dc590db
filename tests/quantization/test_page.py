"""docs/quantization.md: its examples attach to resnet20, and it has every key, dtype, method and option."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from nets import calibrated, net

from dist_compress import config, models, quantization
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.quantization import dtypes, methods
from dist_compress.quantization.config_list import APPLY, NAMES
from dist_compress.quantization.setting import Setting
from dist_compress.target import Coupling

PAGE = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_attach(number):
    loaded = config.load(yaml.safe_load(EXAMPLES[number]))
    model = models.build(loaded.model, 10, 0)
    (quantizer,) = quantization.build(loaded)
    example = ((torch.randn(2, 3, 16, 16),), {})
    context = Context(loaded, model, Projection(model), Coupling(), 1, 1, 1.0, example)
    context.evaluate = lambda _: {"loss": 1.0}
    quantizer.attach(context)
    assert len(quantizer.parameters) == 20 if number else len(quantizer.activations) == 39


def test_the_files_of_the_reader_attach(tmp_path, monkeypatch):
    """A method and an apply method of docs/extending.md."""
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (tmp_path / "mine").mkdir()
    for name, block in re.findall(r"^`(mine/f\w+\.py)`:\n\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    entries = [{"op_types": ["Conv2d", "Linear"], "apply_method": "mine.fading", "apply_options": {"by": 8.0}}]
    quantizer = calibrated(net(), method="mine.fixed", options={"high": 2.0}, config_list=entries)
    assert list(quantizer.rounds()) == []
    source = quantizer.activations["conv1._input_0"]
    assert source.scale.item() == torch.tensor(6 / 255).item() and int(source.zero_point) == 170
    x = torch.tensor([-9.0, 0.5, 9.0]).requires_grad_()
    source(x).sum().backward()
    assert x.grad.tolist() == [0.125, 1.0, 0.125]


def test_nothing_is_missing():
    dtyped = {"binary", "fp8_e4m3", "fp8_e5m2", "int2", "int8", "uint2", "uint8", "int16"}
    wanted = {*Setting.keys(), *dtypes.SCHEMES, *APPLY, *NAMES, *dtyped}
    for module in pkgutil.iter_modules(methods.__path__):
        options = importlib.import_module(f"{methods.__name__}.{module.name}").Options
        wanted |= {module.name, *(field.name for field in dataclasses.fields(options))}
    assert {name for name in wanted if f"`{name}`" not in PAGE and f"`{name}:" not in PAGE} == set()
