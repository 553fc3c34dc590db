"""Where to clip: the range of a tensor chosen from its histogram, on every rank from the same integers.

A histogram is int64 [2 * B] over [-B * width, B * width). Everything is float64 arithmetic on whole counts in a fixed
order, and the first of equals wins. Local, the same on every rank.

Percentile and entropy (KL divergence) as in Migacz 2017, "8-bit inference with TensorRT"; the mean squared error as in
Choukroun et al. 2019, arXiv:1902.06822, by search.
"""

from __future__ import annotations

import torch

from dist_compress.quantization.affine import fake_quantize, qparams
from dist_compress.quantization.dtypes import QuantDtype

STEPS = 100  # candidates of mse_range
PARTS = 4  # points that stand for a bin
LEAST_BINS = 32  # of the narrowest candidate of entropy_range


def percentile_range(counts: torch.Tensor, width: float, low: float, high: float, keep: float) -> tuple[float, float]:
    """The narrowest edges of bins with a fraction of at least `keep` of the values below the upper and above the
    lower one each, within [low, high]."""
    total = int(counts.sum())
    wanted = -(-int(keep * 10**9) * total // 10**9)  # ceil, in integers
    if total == 0:
        return low, high
    half = len(counts) // 2
    below = counts.cumsum(0)
    above = counts.flip(0).cumsum(0)
    top = int((below >= wanted).nonzero()[0]) + 1 - half
    bottom = half - (int((above >= wanted).nonzero()[0]) + 1)
    return max(low, min(bottom * width, 0.0)), min(high, max(top * width, 0.0))


def mse_range(
    counts: torch.Tensor, width: float, low: float, high: float, dtype: QuantDtype, scheme: str
) -> tuple[float, float]:
    """Of the ranges [low, high] * k / STEPS that with the smallest squared error; the widest of equals."""
    half = len(counts) // 2
    used = counts.nonzero()[:, 0]
    if len(used) == 0:
        return low, high
    points = (used[:, None] - half + (torch.arange(PARTS) + 0.5) / PARTS) * width
    points = points.double().clamp(low, high).flatten()
    weights = counts[used].double().repeat_interleave(PARTS)
    best, found = float("inf"), (low, high)
    for k in range(STEPS, 0, -1):
        ends = torch.tensor([low * k / STEPS, high * k / STEPS], dtype=torch.float64)
        scale, zero_point = qparams(ends[0], ends[1], dtype, scheme)
        error = points - fake_quantize(points, scale, zero_point, dtype)
        total = float((weights * error.square()).sum())
        if total < best:
            best, found = total, (float(ends[0]), float(ends[1]))
    return found


def entropy_range(
    counts: torch.Tensor, width: float, low: float, high: float, dtype: QuantDtype, scheme: str
) -> tuple[float, float]:
    """The range clipped at -T and T, where T is the multiple of `width` for which the clipped distribution of abs(x)
    and the quantized one differ least (Kullback-Leibler)."""
    half = len(counts) // 2
    magnitude = (counts[half:] + counts[:half].flip(0)).double()
    if low >= 0 or high <= 0 or scheme != "affine":
        levels = dtype.num_levels if (low >= 0 or high <= 0) and scheme == "affine" else dtype.num_levels // 2
    else:
        levels = dtype.num_levels // 2
    used = magnitude.nonzero()[:, 0]
    if len(used) == 0:
        return low, high
    last = int(used[-1]) + 1
    best, found = float("inf"), last
    for top in range(last, min(max(levels, LEAST_BINS), last) - 1, -max(1, last // 256)):
        divergence = _divergence(magnitude[:top].clone(), float(magnitude[top:].sum()), levels)
        if divergence < best:
            best, found = divergence, top
    return max(low, -found * width), min(high, found * width)


def _divergence(inside: torch.Tensor, outside: float, levels: int) -> float:
    """KL(clipped || quantized): each of `levels` equal stretches of bins is spread evenly over its bins in use."""
    in_use = inside > 0
    level = torch.arange(len(inside)) * levels // len(inside)
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    users = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, in_use.double())
    quantized = torch.where(in_use, mass[level] / users[level].clamp(min=1), 0.0)
    clipped = inside
    clipped[-1] += outside
    p, q = clipped / clipped.sum(), quantized / quantized.sum()
    missing = (p > 0) & (q == 0)
    q = torch.where(missing, 1e-9, q)
    return float(torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum())
