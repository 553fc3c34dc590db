"""Wanda: weights and activations (Sun et al. 2023, arXiv:2306.11695).

The score of a weight is abs(w_ij) * norm(X_j), the Euclidean norm of its input feature over all tokens (of a
convolution, of what its place in the kernel sees). The ratio is spent within each row, that is, among the weights of
one output. What is summed is x^2; the root comes last, of the mean over micro-batches instead of the sum, which is the
same factor for all weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.pruning.metric import Metric


@dataclass
class Options:
    pass


class Wanda(Metric):
    granularity = "element"
    data_driven = True
    hears = "inputs"
    by_rows = True

    def input_statistic(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.double().square().sum(1)

    def block_scores(self, weight: torch.Tensor, heard: torch.Tensor | None) -> torch.Tensor:
        assert heard is not None
        return (weight.double().abs() * heard.sqrt()).sum(1)
