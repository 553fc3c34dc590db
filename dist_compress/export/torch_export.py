"""A program of torch.export: the operators of the model, without its Python code.

    model.pt2     quantized with torch.ops.quantized_decomposed, the weights as integers; for batches of any size

`load` takes it back. Its tensors are plain bytes and its graph is JSON, but torch.export.load would unpickle what a
file marks as pickled, and evaluate the text of its shapes as Python: `load` looks first and refuses both.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.export.parts import agreement
from dist_compress.export.parts.call import moved, named
from dist_compress.export.parts.program import program, quiet
from dist_compress.quantization import convert, deploy
from dist_compress.quantization.fake_quant import Spec
from dist_compress.speedup.plan import Plan

FILE = "model.pt2"
KEY = "export=[torch_export]"
NUM_CHECKED = agreement.NUM_CHECKED
_SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)")
_ARITHMETIC = re.compile(r"([A-Z][A-Za-z]*|[su]\d+|\d|[\s+*/%<>=,()-])*")  # classes of sympy, sizes, numbers


def ready(model: nn.Module, targets: Mapping[tuple[str, str], Spec], example: Any) -> None:
    """Raise UserError unless the float model can be traced. Rank 0 only."""
    program(deepcopy(model).cpu().eval(), example, KEY)


def export(run_dir: str | Path, model: nn.Module, plan: Plan | None, config: Config, example: Any) -> None:
    """Writes `run_dir`/model.pt2, whole or not at all. Rank 0 only. Raises UserError for what cannot be traced."""
    traced = program(convert.convert(deepcopy(model).cpu()), example, KEY)
    traced.example_inputs = None  # held-out data, which would be pickled
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    path = Path(run_dir) / FILE
    draft = path.with_name("part.pt2")
    with quiet():
        torch.export.save(traced, draft)
    os.replace(draft, path)


def load(folder: str | Path) -> nn.Module:
    """The program in a folder, or that file: call it as the model; it returns {name: tensor}. On the CPU. Local.

    Raises UserError for a file with anything in it that would run as Python.
    """
    file = Path(folder).expanduser()
    file = file / FILE if file.is_dir() else file
    _refuse_code(file)
    with quiet():
        return torch.export.load(file).module()


def check(run_dir: str | Path, model: nn.Module, example: Any) -> dict[str, float]:
    """What the loaded program computes, against `model` on `example`. Rank 0 only.

    What `agreement.check` finds; of a quantized model "num_integers" besides, those of weights and biases, compared
    one by one. Raises RuntimeError where they differ too much.
    """
    path = Path(run_dir) / FILE
    loaded = load(path)

    def run(call: Any) -> dict[str, torch.Tensor]:
        args, kwargs = moved(call, "cpu")
        with torch.no_grad():
            return named(loaded(*args, **kwargs))

    found = agreement.check(run, model, example, KEY, path)
    if not deploy.quantizers(model):
        return found
    held = {_plain(name): tensor for name, tensor in loaded.state_dict().items()}
    return {**found, "num_integers": float(convert.compare_integers(model, held, KEY, path))}


def _plain(name: str) -> str:
    return name.replace("parametrizations.", "").removesuffix(".original")


def _refuse_code(file: Path) -> None:
    what = f"load({str(file)!r})"
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            pickles = [n for n in names if n.endswith(".pt") and archive.getinfo(n).file_size]
            pairs = [pair for n in names if n.endswith(".json") for pair in _pairs(json.loads(archive.read(n)))]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{what}: no program of torch.export ({error}). Export it again.") from None
    pickles += [key for key, value in pairs if key == "use_pickle" and value]
    if pickles:
        raise UserError(f"{what}: it holds pickled objects ({pickles[0]}), which may run anything. They are refused.")
    for key, value in pairs:
        if key == "expr_str" and not _ARITHMETIC.fullmatch(_SYMBOL.sub("", value)):
            raise UserError(f"{what}: a size in it is {value!r}, which would run as Python. It is refused.")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of a nest of JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield str(key), inner
        yield from _pairs(inner)
