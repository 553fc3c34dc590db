"""A layer as a matrix product: weights [rows, features] and inputs [tokens, features].

A linear layer, transformers' Conv1D and a convolution compute, in each of their groups, inputs @ weight.T + bias. A
convolution has one token for each place of its output and one feature for each place of its kernel and input channel;
input channels run fastest, so that N:M patterns are consecutive features.

    Linear                   [8, 16]       -> [1, 8, 16]
    Conv1D                   [16, 8]       -> [1, 8, 16]
    Conv2d                   [8, 16, 3, 3] -> [1, 8, 144]
    Conv2d with 4 groups     [8, 4, 3, 3]  -> [4, 2, 36]
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def has_linear_form(module: nn.Module) -> bool:
    """Whether the functions below know the module."""
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or _is_transposed(module)


def weight_rows(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """[groups, rows, features] of anything in the shape of the weight, maybe a view; a row is an output channel."""
    if _is_transposed(module):
        return weight.t()[None]
    return weight.movedim(1, -1).reshape(_groups(module), -1, weight[0].numel())


def from_rows(module: nn.Module, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `weight_rows`, in the shape of the weight."""
    if _is_transposed(module):
        return rows[0].t()
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def input_rows(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """[groups, tokens, features] from what the module is called with."""
    if not isinstance(module, _CONVOLUTIONS):
        return inputs.reshape(1, -1, inputs.shape[-1])
    num_dims = len(module.kernel_size)
    x = inputs if inputs.dim() == num_dims + 2 else inputs[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    places = []
    for offset in itertools.product(*(range(k) for k in module.kernel_size)):
        window = [slice(None), slice(None)]
        for n, o, k, d, s in zip(
            x.shape[2:], offset, module.kernel_size, module.dilation, module.stride, strict=True
        ):  # fmt: skip
            window.append(slice(o * d, n - d * (k - 1 - o), s))
        places.append(x[tuple(window)].flatten(2))  # [samples, channels, positions]
    samples, channels, positions = places[0].shape
    cut = torch.stack(places).view(len(places), samples, module.groups, channels // module.groups, positions)
    return cut.permute(2, 1, 4, 0, 3).reshape(module.groups, samples * positions, -1)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers'


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, _CONVOLUTIONS) else 1
