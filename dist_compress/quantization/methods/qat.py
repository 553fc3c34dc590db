"""Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877).

Ranges of activations are moving averages over optimizer steps of the extent of the global batch; step t uses the range
known after step t - 1. Ranges of weights are the extents of the weights of the step. Rounding passes the gradient
straight through, clipping stops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_compress.errors import UserError
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.observer import MovingAverage, Observer


@dataclass
class Options:
    momentum: float = 0.99  # of the moving average, for each optimizer step

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"quantization.options.momentum={self.momentum}: must be at least 0 and below 1.")


class Qat(FakeQuantize):
    def new_observer(self, shape: Sequence[int], device: torch.device | str) -> Observer:
        return MovingAverage(self.spec.granularity, shape, device, self.options.momentum)
