"""What quantization does to each tensor: range, scale, zero point, signal to noise, share that is clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dist_compress.quantization.affine import in_range
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.tracing.trace import untouched

Row = dict[str, Any]


@torch.no_grad()
def table(
    model: nn.Module,
    activations: Mapping[str, FakeQuantize],
    parameters: Mapping[str, FakeQuantize],
    original: Callable[[str], torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Row]:
    """A row for each target: activations as they are on one call of the model, which is run in eval mode, parameters as
    they are before they are compressed (`original`). Local, the same on every rank."""
    sums: dict[str, _Sums] = {path: _Sums() for path in activations}
    for path, quantizer in activations.items():
        quantizer.watch = _watcher(sums[path], quantizer)
    try:
        with untouched(model):
            model(*args, **kwargs)
    finally:
        for quantizer in activations.values():
            quantizer.watch = None
    for path, quantizer in parameters.items():
        weight = original(path)
        sums[path] = _Sums()
        _watcher(sums[path], quantizer)(weight, quantizer.compress(weight))
    return [_row(quantizer, sums[path]) for path, quantizer in {**activations, **parameters}.items()]


class _Sums:
    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.clipped = self.count = 0
        self.low, self.high = math.inf, -math.inf


def _watcher(sums: _Sums, quantizer: FakeQuantize) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def watch(before: torch.Tensor, after: torch.Tensor) -> None:
        sums.signal += float(before.double().square().sum())
        sums.noise += float((before.double() - after.double()).square().sum())
        inside = in_range(before, *quantizer.scales_for(before), quantizer.spec.dtype)
        sums.clipped += int((~inside).sum())
        sums.count += before.numel()
        sums.low, sums.high = min(sums.low, float(before.min())), max(sums.high, float(before.max()))

    return watch


def _row(quantizer: FakeQuantize, sums: _Sums) -> Row:
    spec = quantizer.spec
    module, target = quantizer.place
    dynamic = spec.granularity.dynamic
    sqnr = 10 * math.log10(sums.signal / sums.noise) if sums.signal > 0 and sums.noise > 0 else None
    return {
        "module": module,
        "target": target,
        "quant_dtype": spec.dtype.name,
        "quant_scheme": spec.scheme,
        "granularity": type(spec.granularity).__name__,
        "low": sums.low if sums.count else None,
        "high": sums.high if sums.count else None,
        "scale": None if dynamic else [float(quantizer.scale.min()), float(quantizer.scale.max())],
        "zero_point": None if dynamic else [int(quantizer.zero_point.min()), int(quantizer.zero_point.max())],
        "sqnr_db": sqnr,
        "clipped": sums.clipped / sums.count if sums.count else None,
    }
