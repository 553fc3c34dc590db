"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): outliers of activations are moved into the weights that they meet.

Channel j of an input is divided by s_j = max abs(x_j)^alpha / max abs(w_j)^(1 - alpha), the maxima over the calibration
data and over the columns of all layers that read it, and those columns are multiplied. alpha, the migration strength,
says how much of the difficulty goes over; 0.5 shares it.

The paper folds into the norm before; here wherever the traced model allows it exactly (channels.py). The ranges of
activations are observed on the smoothed model, as with ptq.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.errors import UserError
from dist_compress.quantization.methods import ptq
from dist_compress.quantization.rescaling import Rescales, View

LEAST = 1e-5  # the smallest scale


@dataclass
class Options(ptq.Options):
    alpha: float = 0.5  # migration strength

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"quantization.options.alpha={self.alpha}: must be at least 0 and at most 1.")


class SmoothQuant(Rescales, ptq.Ptq):
    reduction = "max"

    def input_statistic(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([inputs[:1] * 0, inputs]).abs().amax(0, keepdim=True).double()

    def channel_scales(self, view: View) -> torch.Tensor:
        inputs = view.by_channel([target.statistic[0] for target in view.targets], "amax")
        columns = [target.rows(target.layer.read()).abs().amax(0) for target in view.targets]
        weights = view.by_channel(columns, "amax")
        scales = inputs.pow(self.options.alpha) / weights.pow(1 - self.options.alpha)
        return torch.where((inputs > 0) & (weights > 0), scales.clamp(min=LEAST), 1.0)
