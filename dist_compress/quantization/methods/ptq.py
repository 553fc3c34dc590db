"""Post-training quantization: the model is trained, then calibrated on some batches, and never trained again.

The range of an activation is read off a histogram (`observer`), that of a weight off the weight (`weight_observer`):
its extent, or the part of it with the smallest squared error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_compress.errors import UserError
from dist_compress.quantization import histogram
from dist_compress.quantization.fake_quant import WEIGHT_OBSERVERS, FakeQuantize, check_choice, weight_range
from dist_compress.quantization.observer import Observer


@dataclass
class Options:
    observer: str = "mse"  # min_max | percentile | mse | entropy
    percentile: float = 0.9999  # of the values at either end that stay inside, for percentile
    weight_observer: str = "mse"  # min_max | mse

    def __post_init__(self) -> None:
        check_choice("observer", self.observer, ("min_max", "percentile", "mse", "entropy"))
        check_choice("weight_observer", self.weight_observer, WEIGHT_OBSERVERS)
        if not 0.5 < self.percentile <= 1:
            raise UserError(f"quantization.options.percentile={self.percentile}: must be above 0.5 and at most 1.")


class Ptq(FakeQuantize):
    trains = refits = False
    apply_method = "clamp_round"

    def new_observer(self, shape: Sequence[int], device: torch.device | str) -> Observer:
        spec, options = self.spec, self.options
        if options.observer == "min_max" or spec.dtype.is_float:
            return Observer(spec.granularity, shape, device)
        searches = {
            "percentile": histogram.percentile(options.percentile),
            "mse": histogram.mse(spec.dtype, spec.scheme),
            "entropy": histogram.entropy(spec.dtype, spec.scheme),
        }
        return histogram.Histogram(spec.granularity, shape, device, searches[options.observer])

    def begin(self) -> None:
        super().begin()
        self.observer = None  # the range stays

    def fit(self, weight: torch.Tensor) -> None:
        self.set_range(*weight_range(weight, self.spec, self.options.weight_observer))
