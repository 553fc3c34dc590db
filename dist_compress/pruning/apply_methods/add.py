"""A constant is added to what is masked, as in NNI 3.0 (-1000 there): for the inputs of a softmax, whose output is then
exactly zero where something else is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Options:
    constant: float = -1000.0


def apply(x: torch.Tensor, mask: torch.Tensor, options: Options) -> torch.Tensor:
    return x + (1 - mask) * options.constant
