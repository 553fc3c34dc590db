"""The tables of quantization: as text for the page, as numbers for W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_compress.reporting.figures import Table, size_bytes


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


def candidate(row: Mapping[str, Any]) -> dict[str, str]:
    """{name, type, loss, size, chosen} of a row of `quantization/mixed.py`."""
    return {
        "name": row["name"],
        "type": row["quant_dtype"],
        "loss": f"{row['loss']:+.2g}",
        "size": size_bytes(row["bytes"]),
        "chosen": "chosen" if row["chosen"] else "",
    }


def tables(quantized: Sequence[Mapping[str, Any]], sensitivity: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """By name: numbers stay numbers, of several scales there are the least and the most."""
    columns = [
        "tensor", "quant_dtype", "quant_scheme", "granularity", "low", "high", "scale_min", "scale_max",
        "zero_point_min", "zero_point_max", "sqnr_db", "clipped",
    ]  # fmt: skip
    tensors = [
        [
            f"{row['module']}.{row['target']}", row["quant_dtype"], row["quant_scheme"], row["granularity"], row["low"],
            row["high"], *(row["scale"] or [None, None]), *(row["zero_point"] or [None, None]), row["sqnr_db"],
            row["clipped"],
        ]
        for row in quantized
    ]  # fmt: skip
    names = ["name", "quant_dtype", "loss", "bytes", "chosen"]
    found = {
        "tensors": (columns, tensors),
        "sensitivity": (["weight", *names[1:]], [[row[name] for name in names] for row in sensitivity]),
    }
    return {name: table for name, table in found.items() if table[1]}


def _between(ends: Sequence[float] | None, form: str) -> str:
    """One number, or the least and the most of several scales; a scale computed anew each time has none."""
    if ends is None:
        return "dynamic"
    low, high = (form.format(end) for end in ends)
    return low if low == high else f"{low} to {high}"
