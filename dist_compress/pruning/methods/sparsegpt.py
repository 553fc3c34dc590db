"""SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): remove weights and let the others make up for it.

For a layer with inputs X [tokens, features] and H = X^T X + dampening * mean(diag X^T X), columns are visited from left
to right. What is removed from column c, an error e_c = w_c / [U]_cc with U^T U = H^-1, U upper triangular, is made up
for by the columns to its right: W -= e_c U_c. In each block of `block_size` columns those weights go whose w_c^2 /
[U]_cc^2 is least, as many as are due; of an N:M pattern those of each M when the columns before it are done.

The paper goes from layer to layer with the inputs that pruned layers before it produce. Here all layers of a decision
hear what the model as it is computes; a schedule of several decisions lets later ones hear the earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.errors import UserError
from dist_compress.pruning.metric import Metric


@dataclass
class Options:
    dampening: float = 0.01  # share of the mean of the diagonal that is added to it
    block_size: int = 128  # columns that share one choice of what goes


class SparseGPT(Metric):
    granularity = "element"
    data_driven = True
    hears = "inputs"
    by_rows = True  # weights lie row by row

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        if options.dampening < 0 or options.block_size < 1:
            raise UserError(
                f"pruning method sparsegpt: options.dampening={options.dampening} must not be negative, and "
                f"options.block_size={options.block_size} must be at least 1."
            )

    def input_statistic(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.double()
        return inputs.transpose(1, 2) @ inputs

    def solve(
        self, weight: torch.Tensor, statistic: torch.Tensor, removed: torch.Tensor, number: int, run: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gone = removed.clone()
        w = weight.double().masked_fill(gone, 0)
        upper = self._factor(w, statistic)
        num_rows, num_columns = w.shape
        pattern = run if run < w.numel() else 0
        step = max(self.options.block_size // pattern, 1) * pattern if pattern else self.options.block_size
        left = number  # to remove from this block on
        for start in range(0, num_columns, step):
            block = slice(start, min(start + step, num_columns))
            u = upper[block, block]
            if not pattern:
                done, later = int(removed[:, block].sum()), int(removed[:, block.stop :].sum())
                share = left * (block.stop - start) // (num_columns - start)
                count = min(max(share, done), left - later)
                gone[:, block] = _least(w[:, block] / u.diagonal(), removed[:, block], count)
                left -= count
            errors = torch.zeros(num_rows, block.stop - start, dtype=w.dtype, device=w.device)
            for c in range(start, block.stop):
                if pattern and c % pattern == 0:
                    group = slice(c, c + pattern)
                    scale = upper.diagonal()[group]
                    gone[:, group] = _least_in_rows(w[:, group] / scale, removed[:, group], number)
                error = w[:, c] * gone[:, c] / u[c - start, c - start]
                w[:, c : block.stop] -= error[:, None] * u[c - start, c - start :]
                w[:, c].masked_fill_(gone[:, c], 0)
                errors[:, c - start] = error
            w[:, block.stop :] -= errors @ upper[block, block.stop :]
        return w, gone

    def _factor(self, w: torch.Tensor, statistic: torch.Tensor) -> torch.Tensor:
        """U, float64 [features, features]. A feature that is always zero has no influence: its weights become zero."""
        dead = statistic.diagonal() == 0
        w[:, dead] = 0
        damp = self.options.dampening * statistic.diagonal().mean()
        hessian = statistic + torch.diag(damp + dead.double())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True)


def _least(error: torch.Tensor, removed: torch.Tensor, count: int) -> torch.Tensor:
    """bool [rows, columns]: the `count` with the least square, those of `removed` before all others."""
    order = error.square().masked_fill(removed, -1).flatten().argsort(stable=True)
    gone = torch.zeros_like(order, dtype=torch.bool)
    gone[order[:count]] = True
    return gone.view(error.shape)


def _least_in_rows(error: torch.Tensor, removed: torch.Tensor, count: int) -> torch.Tensor:
    """bool [rows, columns]: the `count` of each row with the least square, those of `removed` before all others."""
    order = error.square().masked_fill(removed, -1).argsort(dim=1, stable=True)
    return torch.zeros_like(removed).scatter_(1, order[:, :count], True)
