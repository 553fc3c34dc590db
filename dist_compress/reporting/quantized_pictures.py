"""What quantization did, as pictures: the noise it adds to each tensor, and what few bits of each weight would cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from dist_compress.reporting.drawing import Drawing, text_width
from dist_compress.reporting.figures import size_bytes

Row = Mapping[str, Any]

_WIDTH = 1040
_DECADES = 5  # of the rise of a loss, that are shown below the largest


def drawn(quantized: Sequence[Row], sensitivity: Sequence[Row]) -> dict[str, Drawing]:
    """{name: picture} of all that there is something to show for. `quantized`: rows of quantization/table.py;
    `sensitivity`: {name, quant_dtype, loss, bytes, chosen}, the candidates of a weight one after the other."""
    found: dict[str, Drawing] = {}
    if any(row["sqnr_db"] is not None for row in quantized):
        found["signal to noise"] = noise(quantized)
    if sensitivity:
        found["sensitivity of the weights"] = sensitivity_bars(sensitivity)
    return found


def noise(rows: Sequence[Row]) -> Drawing:
    """A column for each tensor, as high as its signal to noise ratio; those of one module stand together."""
    height, bottom, top, left = 200, 26, 12, 52
    d = Drawing(_WIDTH, height, f"signal to noise ratio of {len(rows)} quantized tensors")
    highest = max(20.0, *(row["sqnr_db"] or 0.0 for row in rows))
    highest = 10 * math.ceil(highest / 10)
    for level in range(0, highest + 1, 10 if highest <= 50 else 20):
        y = height - bottom - (height - top - bottom) * level / highest
        d.rect(left, y, _WIDTH - left - 4, 0.8, "rule")
        d.text(left - 8, y + 4, f"{level} dB", "end")
    modules = [list(own) for _, own in groupby(rows, key=lambda row: row["module"])]
    slot = (_WIDTH - left - 4) / len(modules)
    every = max(1, math.ceil(len(modules) / (_WIDTH / 130)))
    for place, own in enumerate(modules):
        gap = max(0.8, slot * 0.22)
        width = (slot - gap) / len(own)
        for i, row in enumerate(own):
            decibels = row["sqnr_db"]
            tip = f"{row['module']}.{row['target']}, {row['quant_dtype']}: "
            tip += "exact, or never seen" if decibels is None else f"{decibels:.1f} dB"
            tall = (height - top - bottom) * max(0.0, decibels or 0.0) / highest
            kind = "gone" if row["target"].startswith(("_input_", "_output_")) else "kept"
            space = min(1.0, width * 0.15)
            d.rect(left + place * slot + gap / 2 + i * width, height - bottom - tall, width - space, tall, kind, tip)
        if place % every == 0:
            anchor = "middle" if place else "start"
            d.text(left + (place + 0.5) * slot, height - 9, _short(own[0]["module"], 19), anchor)
    return d


def sensitivity_bars(rows: Sequence[Row]) -> Drawing:
    """A group of bars for each weight, one for each candidate, as long as the logarithm of what the loss rose by; no
    longer than a dot where it did not rise. What was chosen is filled, and named beside."""
    weights = [list(own) for _, own in groupby(rows, key=lambda row: row["name"])]
    most = max(row["loss"] for row in rows)
    top = math.ceil(math.log10(most)) if most > 0 else 0
    positive = [row["loss"] for row in rows if row["loss"] > 0]
    low = max(top - _DECADES, math.floor(math.log10(min(positive)))) if positive else top - 1
    low = min(low, top - 1)
    few = len(rows) <= 120
    bar, between = (11.0, 8.0) if few else (4.0, 3.0)
    names = max(text_width(_short(own[0]["name"])) for own in weights)
    dtypes = max(text_width(row["quant_dtype"]) for row in rows) if few else 0
    left, right, axis = 14 + names + dtypes + 8 * bool(few), 118.0, 22.0
    each = [len(own) * bar + between for own in weights]
    d = Drawing(_WIDTH, sum(each) + axis + 4, f"rise of the loss with each of {len(weights)} weights quantized alone")
    span = _WIDTH - left - right
    bottom = sum(each)
    for decade in range(low, top + 1):
        x = left + span * (decade - low) / (top - low)
        d.rect(x, 0, 0.8, bottom, "rule")
        d.text(x, bottom + 15, f"{10.0**decade:g}", "middle")
    y = between / 2
    for own, tall in zip(weights, each, strict=True):
        anything = any(row["chosen"] for row in own)
        for i, row in enumerate(own):
            part = (math.log10(row["loss"]) - low) / (top - low) if row["loss"] > 0 else 0.0
            at, length = y + i * bar, max(3.0, span * max(0.0, part))
            tip = f"{row['name']} as {row['quant_dtype']}: loss {row['loss']:+.2g}, {size_bytes(row['bytes'])}"
            kind = "kept" if row["chosen"] or not anything else "gone"
            d.rect(left, at, length, bar - 1.5, kind, tip, 1.0 if row["chosen"] or not anything else 0.45)
            if few:
                d.text(left - 8, at + bar - 2, row["quant_dtype"], "end")
            if row["chosen"] and few:
                d.text(_WIDTH - right + 10, at + bar - 2, f"{row['quant_dtype']}, {size_bytes(row['bytes'])}")
        if few or len(weights) <= 60:
            d.text(left - dtypes - 16 * bool(few), y + (tall - between) / 2 + 4, _short(own[0]["name"]), "end", "name")
        y += tall
    return d


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
