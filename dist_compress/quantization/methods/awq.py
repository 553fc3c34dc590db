"""Activation-aware weight quantization (Lin et al. 2023, arXiv:2306.00978): columns of a weight that meet large inputs
are made larger before it is rounded, and what comes before is divided by as much.

The scale of a channel is s = mean(abs(x))^a, divided by sqrt(max s * min s); a is searched over [0, 1], for all layers
that read the channels together, by the squared error of their outputs over the calibration data, sum of
(W - Q(W s) / s) X^T X (W - Q(W s) / s)^T. Of equals the smallest a is taken; a = 0 is rounding to the nearest.

The paper folds into a norm or linear layer; here wherever the traced model allows it exactly (channels.py). Activations
stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.errors import UserError
from dist_compress.quantization.fake_quant import WEIGHT_OBSERVERS, check_choice, weight_range
from dist_compress.quantization.rescaling import Rescales, Target, View


@dataclass
class Options:
    num_steps: int = 20  # of the search: exponents 0, 1 / num_steps, .., 1
    weight_observer: str = "mse"  # ranges: min_max | mse

    def __post_init__(self) -> None:
        check_choice("weight_observer", self.weight_observer, WEIGHT_OBSERVERS)
        if self.num_steps < 1:
            raise UserError(f"quantization.options.num_steps={self.num_steps} must be at least 1.")


class Awq(Rescales):
    trains = refits = activations = False
    apply_method = "clamp_round"

    def input_statistic(self, inputs: torch.Tensor) -> torch.Tensor:
        """X^T X, and a last row with the sum of abs(x)."""
        inputs = inputs.double()
        return torch.cat([inputs.t() @ inputs, inputs.abs().sum(0, keepdim=True)])

    def fit(self, weight: torch.Tensor) -> None:
        self.set_range(*weight_range(weight, self.spec, self.options.weight_observer))

    def channel_scales(self, view: View) -> torch.Tensor:
        size = view.by_channel([target.statistic[-1] for target in view.targets], "mean")
        best, found = float("inf"), torch.ones_like(size)
        for k in range(self.options.num_steps + 1):
            scales = _scales(size, k / self.options.num_steps)
            error = sum(_error(target, scales) for target in view.targets)
            if error < best:
                best, found = error, scales
        return found


def _scales(size: torch.Tensor, exponent: float) -> torch.Tensor:
    """float64 [num_channels]; 1 for channels that are always zero."""
    alive = size > 0
    if not bool(alive.any()):
        return torch.ones_like(size)
    scales = size.pow(exponent)
    middle = (scales[alive].max() * scales[alive].min()).sqrt()
    return torch.where(alive, scales / middle, 1.0)


def _error(target: Target, scales: torch.Tensor) -> float:
    """Of the outputs, summed over all tokens."""
    weight, columns, quantizer = target.layer.read(), target.columns(scales), target.layer.quantizer
    scaled = (weight.double() * columns).to(weight.dtype)
    quantizer.fit(scaled)
    lost = target.rows(quantizer.compress(scaled).double() / columns - weight.double())
    return float(((lost @ target.statistic[:-1]) * lost).sum())
