"""How models are called, and what of their answer is logits. Everything here is local."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

IGNORED = -100  # the target of a token that does not count


def call(model: nn.Module, inputs: Any) -> Any:
    """`inputs`: a tensor, or a dict of keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def logits(output: Any) -> torch.Tensor:
    """The logits [n, classes] of a plain tensor, a Hugging Face output or a torchvision namedtuple."""
    return output if isinstance(output, torch.Tensor) else output.logits
