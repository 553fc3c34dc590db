"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): weights are rounded one column after the other, and the columns that
are still to come make up for what each rounding did to the output of the layer.

For a layer with inputs X [tokens, features] and H = X^T X + dampening * mean(diag X^T X), rounding column c leaves an
error e_c = (w_c - q_c) / [U]_cc with U^T U = H^-1, U upper triangular, and W -= e_c U_c to the right of it. Groups of
columns with a scale of their own (per_group) get it when the columns before them are done; with `act_order`, which
takes the columns with the largest inputs first, from the weights as they were, so that groups stay together.

The paper goes from layer to layer with the inputs that the layers before it, rounded, produce. Here all layers hear the
float model. Weights that meet a feature that was always zero are rounded to the nearest. Activations stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.linear_form import from_rows, weight_rows
from dist_compress.quantization.affine import fake_quantize, qparams
from dist_compress.quantization.fake_quant import WEIGHT_OBSERVERS, check_choice, weight_range
from dist_compress.quantization.granularity import PerGroup
from dist_compress.quantization.solving import Solves


@dataclass
class Options:
    dampening: float = 0.01  # share of the mean of the diagonal that is added to it
    act_order: bool = False  # columns by the size of their inputs, largest first
    block_size: int = 128  # columns after which those that follow are updated, all at once
    weight_observer: str = "mse"  # ranges: min_max | mse

    def __post_init__(self) -> None:
        check_choice("weight_observer", self.weight_observer, WEIGHT_OBSERVERS)
        if self.dampening < 0 or self.block_size < 1:
            raise UserError(
                f"quantization.options.dampening={self.dampening} must not be negative, and block_size="
                f"{self.block_size} must be at least 1."
            )


class Gptq(Solves):
    trains = refits = activations = False
    apply_method = "clamp_round"

    def solve(
        self, module: nn.Module, weight: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        self.set_range(*self._range(weight))
        scale, zero_point = (weight_rows(module, t.expand_as(weight)).clone() for t in self.scales_for(weight))
        w = weight_rows(module, weight).double().clone()
        everything = torch.ones(1, dtype=torch.bool, device=w.device)
        kept = weight_rows(module, (everything if keep is None else keep).expand_as(weight))
        granularity = self.spec.granularity
        live = isinstance(granularity, PerGroup) and isinstance(module, nn.Linear) and not self.options.act_order
        group = granularity.size if live else 0  # type: ignore[attr-defined]
        for g in range(len(w)):
            order = torch.arange(w.shape[2], device=w.device)
            if self.options.act_order:
                order = gram[g].diagonal().argsort(descending=True, stable=True)
            mine = w[g][:, order], scale[g][:, order], zero_point[g][:, order]
            self._solve(*mine, gram[g][order][:, order], kept[g][:, order], group)
            for whole_part, part in zip((w, scale, zero_point), mine, strict=True):
                whole_part[g][:, order] = part
        if group:
            self.scale.copy_(scale[0][:, ::group])
            self.zero_point.copy_(zero_point[0][:, ::group])
        return from_rows(module, w.to(weight.dtype), weight.shape)

    def _solve(
        self, w: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor,
        group: int,
    ) -> None:  # fmt: skip
        """Round w, float64 [rows, features], in place; scales of the same shape, those of each `group` columns in place
        when they are reached (0: they stay)."""
        upper, num_columns = self._factor(gram), w.shape[1]
        size = max(self.options.block_size // group, 1) * group if group else self.options.block_size
        for start in range(0, num_columns, size):
            block = slice(start, min(start + size, num_columns))
            errors = torch.zeros_like(w[:, block])
            for c in range(start, block.stop):
                if group and c % group == 0:
                    here = slice(c, c + group)
                    found = qparams(*self._range(w[:, here]), self.spec.dtype, self.spec.scheme)
                    scale[:, here], zero_point[:, here] = (t.view(-1, 1) for t in found)
                rounded = fake_quantize(w[:, c], scale[:, c], zero_point[:, c], self.spec.dtype)
                rounded.masked_fill_(~keep[:, c], 0)
                error = (w[:, c] - rounded) / upper[c, c]
                w[:, c] = rounded
                w[:, c + 1 : block.stop] -= error[:, None] * upper[c, c + 1 : block.stop]
                errors[:, c - start] = error
            w[:, block.stop :] -= errors @ upper[block, block.stop :]

    def _factor(self, gram: torch.Tensor) -> torch.Tensor:
        """U, float64 [features, features]."""
        diagonal = gram.diagonal()
        damp = self.options.dampening * diagonal.mean() + (diagonal == 0).double()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.diag(damp)))
        return torch.linalg.cholesky(inverse, upper=True)

    def _range(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 low and high of each block of a weight, or of some of its columns."""
        return weight_range(weight, self.spec, self.options.weight_observer)
