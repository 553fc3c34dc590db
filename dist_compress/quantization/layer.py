"""A layer as methods see it that change its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dist_compress.quantization.fake_quant import FakeQuantize


@dataclass(frozen=True)
class Layer:
    name: str
    module: nn.Module
    quantizer: FakeQuantize  # of the method; of its weight, or where only that has the method of its input
    read: Callable[[], torch.Tensor]  # the weight as it will be quantized, masked and folded with its norm, if any
    write: Callable[[torch.Tensor], None]  # puts it back
    keep: torch.Tensor | None  # bool, broadcastable to the weight: what was not pruned

    @property
    def method(self) -> str:
        return type(self.quantizer).__module__.rpartition(".")[2]
