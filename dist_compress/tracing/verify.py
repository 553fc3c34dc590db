"""How far two outputs of a model are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from dist_compress.tracing.nest import opened


def verify(reference: Any, outputs: Any) -> float:
    """max|outputs - reference| / max|reference| over all tensors of two pytrees of the same form. Local.

    Infinite when the forms, shapes or non-finite places differ; each tensor is compared in float64.
    """
    expected, form = tree_flatten(opened(reference))
    actual, other = tree_flatten(opened(outputs))
    if form != other:
        return float("inf")
    scale, worst = 0.0, 0.0
    for a, b in zip(expected, actual, strict=True):
        if not isinstance(a, torch.Tensor) or a.numel() == 0:
            continue
        if a.shape != b.shape:
            return float("inf")
        a, b = a.detach().double(), b.detach().double()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        scale = max(scale, float(a.abs().max()))
        worst = max(worst, float((a - b).abs().max()))
    return worst / scale if scale > 0 else (float("inf") if worst > 0 else 0.0)
