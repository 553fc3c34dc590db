"""What of a model can shrink, and what keeps the rest: no data, no training.

    python -m dist_compress.explain resnet50 --input 1,3,64,64 --svg coupling.svg
    python -m dist_compress.explain my_package.models.make_net --input 1,16 --norm exact

MODEL is a name of torchvision or timm, or the dotted path of a callable that builds a model.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from dist_compress import models
from dist_compress.config import ModelConfig
from dist_compress.errors import UserError
from dist_compress.reporting.coupling_chart import coupling_chart
from dist_compress.speedup import Ties, capture, coupling, explain_group
from dist_compress.target import Coupling, UnitGroup


def main(words: Sequence[str] | None = None) -> None:
    """The command. Prints a table of the coupling groups; what the user can mend ends it with status 2."""
    about = "What of a model can shrink, and what keeps the rest."
    parser = argparse.ArgumentParser("python -m dist_compress.explain", description=about)
    parser.add_argument("model", help="a name of torchvision or timm, or package.module.callable")
    parser.add_argument("--input", help="shape of the input, the batch first (timm: the model's own; else 1,3,64,64)")
    parser.add_argument("--dtype", default="float32", help="of the input; integers are zeros (float32)")
    parser.add_argument("--norm", default="keep", help="keep, exact or plain (keep)")
    parser.add_argument("--svg", help="file to draw the groups to")
    given = parser.parse_args(words)
    try:
        explain_model(given.model, given.input, given.dtype, given.norm, given.svg)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(Text(str(error)))
        sys.exit(2)


def explain_model(
    name: str, shape: str | None, dtype: str = "float32", norm: str = "keep", svg: str | None = None
) -> None:
    """Print the groups of a model by name, and draw them to the file `svg`. Raises UserError."""
    model = build(name).eval()
    sizes = getattr(model, "default_cfg", {}).get("input_size", (3, 64, 64))  # what timm knows of its models
    looked = capture(model, (_input(shape or ",".join(map(str, (1, *sizes))), dtype),), norm=norm)
    found = coupling(looked)
    Console().print(table(model, found, Ties(looked)))
    if svg is not None:
        chart = coupling_chart(found, [module for module, _ in model.named_modules()])
        Path(svg).write_text(chart, encoding="utf-8")


def build(name: str) -> nn.Module:
    """The model of a name, with random weights. Raises UserError."""
    if name in importlib.import_module("torchvision.models").list_models():
        return models.build(ModelConfig(source="torchvision", name=name), 1000, seed=0)
    if "." not in name:
        return models.build(ModelConfig(source="timm", name=name), 1000, seed=0)
    return models.build(ModelConfig(target={"_target_": name}), 1000, seed=0)


def table(model: nn.Module, found: Coupling, ties: Ties) -> Table:
    """The groups in the order of the model; for a blocked one the chain of ops that blocks it."""
    total = sum(layer.macs for layer in found.layers) or 1
    result = Table(title=f"{type(model).__name__}: {len(found.groups)} coupling groups")
    for column, side in (("group", "left"), ("units", "right"), ("parameters", "right"), ("MACs", "right")):
        result.add_column(column, justify=side)  # type: ignore[arg-type]
    result.add_column("can go")
    for i, group in enumerate(found.groups):
        macs = sum(c.macs for c in found.layers if any(own == i for _, parts in c.factors for own, _ in parts))
        makers = group.producers()
        name = group.name + (f" and {len(makers) - 1} more" if len(makers) > 1 else "")
        cells = (name, str(group.num_units), f"{_params(model, group):,}", f"{macs / total:.1%}", _fate(group, ties))
        result.add_row(*map(Text, cells), style="dim" if group.blocked else "")
    return result


def _fate(group: UnitGroup, ties: Ties) -> str:
    if not group.blocked:
        return "yes"
    why = explain_group(ties, group)
    return f"no: {group.blocked}" if why is None else "no: " + " <- ".join((*why.steps, why.reason))


def _params(model: nn.Module, group: UnitGroup) -> int:
    """Parameters that all units of the group hold, those shared with other groups included."""
    return sum(
        model.get_parameter(m.fqn).numel() * m.index.numel() // model.get_parameter(m.fqn).shape[m.dim]
        for m in group.members
    )


def _input(shape: str, dtype: str) -> torch.Tensor:
    try:
        sizes = [int(word) for word in shape.split(",")]
        assert all(size > 0 for size in sizes)
    except (ValueError, AssertionError):
        raise UserError(f"--input={shape}: give positive sizes with commas, such as 1,3,64,64.") from None
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise UserError(f"--dtype={dtype}: no type of torch; give float32 or int64, for example.")
    if not kind.is_floating_point:
        return torch.zeros(sizes, dtype=kind)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(kind)


if __name__ == "__main__":
    main()
