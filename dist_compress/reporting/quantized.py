"""Rows of the table of quantized tensors, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def quantized_tensor(row: Mapping[str, Any]) -> dict[str, str]:
    """{name, type, range, scale, zero_point, sqnr, clipped} of a row of `quantization/table.py`."""
    return {
        "name": f"{row['module']}.{row['target']}",
        "type": f"{row['quant_dtype']} {row['quant_scheme'].replace('_', ' ')}",
        "range": "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}",
        "scale": _between(row["scale"], "{:.3g}"),
        "zero_point": _between(row["zero_point"], "{:d}"),
        "sqnr": "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB",
        "clipped": "" if row["clipped"] is None else f"{row['clipped']:.3%}",
    }


def _between(ends: Sequence[float] | None, form: str) -> str:
    """One number, or the least and the most of several scales; a scale computed anew each time has none."""
    if ends is None:
        return "dynamic"
    low, high = (form.format(end) for end in ends)
    return low if low == high else f"{low} to {high}"
