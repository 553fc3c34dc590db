"""What pruning did, as pictures: which channels are left, how much of each layer, and what the scores looked like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from dist_compress.reporting.drawing import Drawing, text_width
from dist_compress.reporting.figures import count, percent

Row = Mapping[str, Any]

_WIDTH = 1040
_MOST_CELLS = 256  # of a row of the map; wider layers are put together
_MOST_PANELS = 24


def drawn(layers: Sequence[Row], kept_channels: Sequence[Row], scores: Sequence[Row]) -> dict[str, Drawing]:
    """{name: picture} of all that there is something to show for."""
    found: dict[str, Drawing | None] = {}
    if kept_channels:
        found["kept channels"] = kept_map(kept_channels)
    if layers:
        found["kept part of the layers"] = layer_columns("kept part", layers, "before", "after", relative=True)
    if any(layer["macs_before"] for layer in layers):
        found["MACs of the layers"] = layer_columns("MACs", layers, "macs_before", "macs_after")
    found["scores"] = score_panels(scores)
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def kept_map(rows: Sequence[Row]) -> Drawing:
    """A row for each layer, a cell for each of its channels, all rows equally wide. `rows`: {name, kept}, a text with
    1 for each channel that is kept and 0 for each that went."""
    step = 20 if len(rows) <= 30 else 12 if len(rows) <= 120 else 6
    every = max(1, math.ceil(11 / step))  # a label where there is room
    left = 14 + max(text_width(_short(row["name"])) for row in rows)
    cells = _WIDTH - left - 76
    d = Drawing(_WIDTH, step * len(rows) + 6, f"kept channels of {len(rows)} layers")
    for i, row in enumerate(rows):
        y, kept = 3 + i * step, [int(k) for k in row["kept"]]
        per = math.ceil(len(kept) / _MOST_CELLS)
        shares = [sum(kept[a : a + per]) / len(kept[a : a + per]) for a in range(0, len(kept), per)]
        width, height = cells / len(shares), step - (4 if step > 12 else 2)
        told = f"{sum(kept)} of {len(kept)}"
        d.rect(left, y, cells, height, "track", f"{row['name']}: {told} channels kept")
        at = 0
        for share, run in groupby(shares):
            num = len(list(run))
            if share > 0:
                gap = 0.5 if width > 8 else 0
                for start, length in [(at, num)] if gap == 0 else [(at + k, 1) for k in range(num)]:
                    x = left + start * width
                    tip = f"{row['name']}, channel {start * per}: kept" if gap else ""
                    d.rect(x, y, length * width - gap, height, "kept", tip, 0.25 + 0.75 * share if share < 1 else 1)
            at += num
        if i % every == 0:
            base = y + height / 2 + 4
            d.text(left - 8, base, _short(row["name"]), "end", "name")
            d.text(_WIDTH - 66, base, f"{sum(kept)} / {len(kept)}")
    return d


def layer_columns(title: str, layers: Sequence[Row], before: str, after: str, relative: bool = False) -> Drawing:
    """A column for each layer: what it had, and in it what is left. `relative`: every layer had 100 %."""
    height, bottom, top, left = 190, 26, 12, 62
    d = Drawing(_WIDTH, height, title)
    width = (_WIDTH - left - 4) / len(layers)
    highest = 1.0 if relative else max([layer[before] for layer in layers] + [1])
    for part in (0, 0.5, 1):
        y = height - bottom - (height - top - bottom) * part
        d.rect(left, y, _WIDTH - left - 4, 0.8, "rule")
        d.text(left - 8, y + 4, percent(part, 0) if relative else count(part * highest), "end")
    for i, layer in enumerate(layers):
        x, had, has = left + i * width, layer[before], layer[after]
        gap = max(0.6, width * 0.18)
        tip = f"{layer['name']}: {count(had)} -> {count(has)}" + (f" ({percent(has / had, 0)})" if had else "")
        for value, kind in ((had, "track"), (has, "kept")):
            tall = (height - top - bottom) * (value / (had or 1) if relative else value / highest)
            d.rect(x + gap / 2, height - bottom - tall, width - gap, tall, kind, tip)
    for i in range(0, len(layers), max(1, math.ceil(len(layers) / (_WIDTH / 130)))):
        d.text(left + (i + 0.5) * width, height - 9, _short(layers[i]["name"], 19), "middle" if i else "start")
    return d


def score_panels(rows: Sequence[Row]) -> Drawing | None:
    """A small histogram for each group and decision, columns of four. `rows`: {step, name, edges, kept, removed}."""
    panels = _chosen([row for row in rows if row["kept"]])
    if not panels:
        return None
    wide, tall, gap = 245, 132, 20
    lines = math.ceil(len(panels) / 4)
    d = Drawing(_WIDTH, lines * (tall + gap) - gap + 6, f"scores of {len(panels)} decisions of groups")
    for number, row in enumerate(panels):
        x, y = (number % 4) * (wide + gap), (number // 4) * (tall + gap)
        d.text(x, y + 11, _short(row["name"], 26), kind="name")
        d.text(x + wide, y + 11, f"step {row['step']}", "end")
        _bars(d, x, y + 18, wide, tall - 36, row)
    return d


def _bars(d: Drawing, x: float, y: float, wide: float, tall: float, row: Row) -> None:
    kept, removed, edges = row["kept"], row["removed"], row["edges"]
    highest = max(a + b for a, b in zip(kept, removed, strict=True))
    width = wide / len(kept)
    for i, (stays, goes) in enumerate(zip(kept, removed, strict=True)):
        tip = f"scores {edges[i]:.3g} to {edges[i + 1]:.3g}: {stays} kept, {goes} removed"
        low, high = tall * goes / highest, tall * stays / highest
        if goes:
            d.rect(x + i * width, y + tall - low, width - 0.8, low, "gone", tip)
        if stays:
            d.rect(x + i * width, y + tall - low - high, width - 0.8, high, "kept", tip)
    d.rect(x, y + tall, wide, 0.8, "rule")
    middle = len(kept) // 2
    for place, anchor in ((0, "start"), (middle, "middle"), (len(kept), "end")):
        if place != middle or len(kept) > 3:
            d.text(x + place * width, y + tall + 14, f"{edges[place]:.2g}", anchor)


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """At most about _MOST_PANELS: all groups at the last decision first, then decisions spread evenly."""
    steps = list(dict.fromkeys(row["step"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    if not steps:
        return []
    most = max(1, _MOST_PANELS // len(names))
    if len(steps) > most:
        last = len(steps) - 1
        steps = [steps[last]] if most == 1 else [steps[round(i * last / (most - 1))] for i in range(most)]
    order = {name: i for i, name in enumerate(names)}
    chosen = [row for row in rows if row["step"] in steps]
    return sorted(chosen, key=lambda row: (order[row["name"]], row["step"]))[:_MOST_PANELS]


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
