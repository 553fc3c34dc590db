"""What data-driven methods hear of the inputs of layers, brought to the blocks of their weights.

The inputs of all layers that are scored are one statistic; each layer that is solved has its own, which is large.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.layout import cut
from dist_compress.linear_form import from_rows, has_linear_form
from dist_compress.pruning.elements import BlockTensor, Elements
from dist_compress.pruning.inputs import Inputs
from dist_compress.pruning.metric import Metric


class BlockData:
    """Inputs are heard as micro-batches are; only what belongs to the blocks of a rank is made there."""

    def __init__(self, elements: Elements, model: nn.Module, metrics: Mapping[str, Metric], num_micro: int) -> None:
        """`metrics`: by target. Local. Raises UserError for a layer whose inputs have no meaning here."""
        self.model, self.elements = model, elements
        self.by_inputs = [t for t in elements.tensors() if metrics[t.setting.name].hears == "inputs"]
        for tensor in self.by_inputs:
            _check(tensor, model)
        by_layer = {t.name: {t.setting.module: metrics[t.setting.name]} for t in self.by_inputs}
        self.solved = [t for t in self.by_inputs if metrics[t.setting.name].solves]
        self.by_inputs = [t for t in self.by_inputs if not metrics[t.setting.name].solves]
        together = {layer: metric for t in self.by_inputs for layer, metric in by_layer[t.name].items()}
        self.inputs = Inputs(model, together, num_micro) if together else None
        self.alone = {t.name: Inputs(model, by_layer[t.name], num_micro) for t in self.solved}  # by parameter

    def listeners(self) -> dict[str, Inputs]:
        """By a name for the checkpoint."""
        return ({"inputs": self.inputs} if self.inputs else {}) | {f"inputs {n}": x for n, x in self.alone.items()}

    def wanted(self, targets: Collection[str]) -> list[BlockTensor]:
        """Those of `targets` that hear inputs and are scored."""
        return [t for t in self.by_inputs if t.setting.name in targets]

    def heard(self, targets: Collection[str], total: torch.Tensor | None) -> dict[str, list[torch.Tensor]]:
        """{parameter: [blocks, weights of a block] for each run of slabs this rank decides} of those of `targets` that
        hear inputs, whose statistic has this `total` over all ranks. Local."""
        wanted = self.wanted(targets)
        means = self.inputs.means(total) if self.inputs and total is not None else {}
        found = {}
        for tensor in wanted:
            module, shape = self.model.get_submodule(tensor.setting.module), torch.Size(tensor.blocks.shape)
            mean = means[tensor.setting.module][:, None]  # [groups, 1, features]
            num_rows = shape.numel() // (mean.shape[0] * mean.shape[2])
            full = from_rows(module, mean.expand(-1, num_rows, -1), shape)
            runs = self.elements.placed.owned(tensor.name)
            found[tensor.name] = [run.rows(cut(full, run.start, run.end)) for run in runs]
        return found


def _check(tensor: BlockTensor, model: nn.Module) -> None:
    setting = tensor.setting
    module: Any = model.get_submodule(setting.module)
    if setting.target != "weight" or not has_linear_form(module):
        raise UserError(
            f"{setting.name}: {setting.said_by('method')} scores by the inputs of a layer, which it knows for weights "
            f"of Linear, Conv1d, Conv2d, Conv3d and transformers' Conv1D, but this is the {setting.target} of a "
            f"{type(module).__name__}. Choose another method for it, or leave it out."
        )
