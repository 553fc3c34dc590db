"""What a mask of an activation is in terms of weights, where that is exact: it can then leave the model.

    output channels of a linear layer, a convolution or an embedding: its weight and bias are zero there
    output channels of a norm: its weight and bias are zero there
    input channels of a linear layer or convolution: its weight is zero for them

Only for torch's own classes, with weights that no other module shares, and with nothing else hooked to the module.
"""

from __future__ import annotations

import torch
from torch import nn

from dist_compress.layout import Layout
from dist_compress.pruning.setting import Setting

# class: (dim of the weight for output channels, for input channels; None: not by the weight)
_LAYERS: dict[type[nn.Module], tuple[int, int | None]] = {
    nn.Linear: (0, 1),
    nn.Conv1d: (0, 1),
    nn.Conv2d: (0, 1),
    nn.Conv3d: (0, 1),
    nn.ConvTranspose1d: (1, 0),
    nn.ConvTranspose2d: (1, 0),
    nn.ConvTranspose3d: (1, 0),
    nn.Embedding: (1, None),
    nn.BatchNorm1d: (0, None),
    nn.BatchNorm2d: (0, None),
    nn.BatchNorm3d: (0, None),
    nn.SyncBatchNorm: (0, None),
    nn.GroupNorm: (0, None),
    nn.LayerNorm: (0, None),
}


def fold(layout: Layout, setting: Setting, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Zero the weights that do what `mask` (bool, True = keep) does to an activation, and return their masks,
    {parameter: bool, of what this rank holds}; {} and nothing done where no weight can. Local."""
    module = layout.model.get_submodule(setting.module)
    dim = _dim(layout.model, module, setting)
    channels = mask.flatten()
    weight = module._parameters.get("weight")
    if dim is None or weight is None or weight.shape[dim] != len(channels):
        return {}
    masks = {"weight": channels.view([-1 if d == dim else 1 for d in range(weight.dim())]).expand(weight.shape)}
    if setting.target.startswith("_output_") and module._parameters.get("bias") is not None:
        masks["bias"] = channels
    folded = {}
    for name, kept in masks.items():
        path = f"{setting.module}.{name}"
        folded[path] = layout.part(path, kept).clone()
        layout.local(path).masked_fill_(~folded[path], 0)
    return folded


def _dim(model: nn.Module, module: nn.Module, setting: Setting) -> int | None:
    """Of the weight, along which the channels lie; None where the mask cannot be folded."""
    by_channel = setting.granularity in ("per_channel", "default")
    if type(module) not in _LAYERS or setting.apply_method != "mul" or not by_channel:
        return None
    if len(module._forward_hooks) + len(module._forward_pre_hooks) > 1:  # ours, and somebody else's
        return None
    own = [id(p) for p in module.parameters(recurse=False)]
    holders = [m for m in model.modules() if any(id(p) in own for p in m.parameters(recurse=False))]
    if len(holders) > 1:
        return None
    output, given = _LAYERS[type(module)]
    if setting.target.startswith("_output_"):
        return output if getattr(module, "groups", 1) == 1 or output == 0 else None
    return given if getattr(module, "groups", 1) == 1 else None
