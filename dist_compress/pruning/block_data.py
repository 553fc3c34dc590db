"""What data-driven methods hear of blocks of weights: the gradient of the last step, or sums over inputs.

The inputs of all layers that are scored are one statistic; each layer that is solved has its own, which is large.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.linear_form import from_rows, has_linear_form
from dist_compress.pruning.elements import BlockTensor, Elements
from dist_compress.pruning.inputs import Inputs
from dist_compress.pruning.metric import Metric


class BlockData:
    """Rank r keeps gradients of the blocks it owns alone; inputs are heard as micro-batches are."""

    def __init__(self, elements: Elements, model: nn.Module, metrics: Mapping[str, Metric], num_micro: int) -> None:
        """`metrics`: by target. Local. Raises UserError for a layer whose inputs have no meaning here."""
        self.model = model
        self.by_gradient = [t for t in elements.tensors() if metrics[t.setting.name].hears_gradients]
        self.by_inputs = [t for t in elements.tensors() if metrics[t.setting.name].hears == "inputs"]
        self.gradients: dict[str, torch.Tensor] = {}
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

    def keep_gradients(self, targets: Collection[str]) -> None:
        """Take this rank's blocks of the reduced gradients of `targets`; zeros where there is none. Local."""
        for tensor in [t for t in self.by_gradient if t.setting.name in targets]:
            start, end = tensor.owned()
            grad = self.model.get_parameter(tensor.name).grad
            if grad is None:
                device = self.model.get_parameter(tensor.name).device
                self.gradients[tensor.name] = torch.zeros(end - start, tensor.blocks.size, device=device)
            else:
                self.gradients[tensor.name] = tensor.blocks.rows(grad.detach())[start:end].clone()

    def heard(self, targets: Collection[str]) -> dict[str, torch.Tensor]:
        """{parameter: [owned blocks, weights of a block]} of those of `targets` that are driven by data. Collective if
        any of them hears inputs."""
        found, self.gradients = self.gradients, {}
        wanted = [t for t in self.by_inputs if t.setting.name in targets]
        means = self.inputs.means() if self.inputs and wanted else {}
        for tensor in wanted:
            start, end = tensor.owned()
            module = self.model.get_submodule(tensor.setting.module)
            shape = self.model.get_parameter(tensor.name).shape
            mean = means[tensor.setting.module][:, None]  # [groups, 1, features]
            num_rows = shape.numel() // (mean.shape[0] * mean.shape[2])
            rows = mean.expand(-1, num_rows, -1)
            found[tensor.name] = tensor.blocks.rows(from_rows(module, rows, shape))[start:end]
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
