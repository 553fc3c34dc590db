"""The flat summary as figures for people: what was measured before and after, and how it changed.

The console table and the report page are drawn from the same rows, so that they cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Summary keys without their /before or /after, in the order in which they are shown.
_COSTS = {"params": "Parameters", "macs": "MACs"}
_LIMITS = {"macs": "MACs", "params": "Parameters", "latency_ms": "Latency"}
_LATENCY = re.compile(r"latency_ms/(p\d+)/(onnx/)?(?:before|after)/b(\d+)")
_FILE = re.compile(r"file_bytes/(\w+)/after")


@dataclass(frozen=True)
class Figure:
    """One line of the before/after table. `better` is None where neither direction is or nothing changed."""

    key: str  # e.g. "macs", "latency_ms/p50/b1"
    label: str
    before: str
    after: str
    change: str  # e.g. "2.13x smaller", "-0.56 points"
    better: bool | None
    fraction: float | None = None  # after / before of a cost, for drawing


@dataclass(frozen=True)
class Limit:
    """What the whole model was to cost at most: asked, by the last decision, and really."""

    unit: str
    label: str
    asked: str
    predicted: str
    reached: str
    verdict: str
    held: bool


def count(value: float) -> str:
    """11173962 -> "11.17 M"."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"


def size_bytes(value: float) -> str:
    """1093632 -> "1.09 MB" (decimal units)."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def number(value: Any) -> str:
    """Any plain value of a summary, short. Whole numbers keep their digits, floats get four that matter."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", "\u202f")
    return str(value)


def fingerprint(value: Any) -> str:
    """A 64-bit fingerprint as 16 hexadecimal digits; text is shown as it is."""
    return f"{value & (2**64 - 1):016x}" if isinstance(value, int) else str(value)


def source_name(section: Mapping[str, Any]) -> str:
    """What to call the model or data of a section of the config: the last name of a callable or folder."""
    target = section.get("_target_") or (section.get("target") or {}).get("_target_")
    if target:
        return str(target).rpartition(".")[2]
    return str(section.get("name") or section.get("source") or "").rstrip("/").rpartition("/")[2]


def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f} %"


def _cost(
    key: str,
    label: str,
    before: float,
    after: float,
    show: Callable[[float], str],
    better: str,
    worse: str,
) -> Figure:
    if before <= 0 or after <= 0 or before == after:
        return Figure(key, label, show(before), show(after), "same" if before == after else "", None)
    ratio = before / after
    change = f"{ratio:.2f}x {better}" if ratio >= 1 else f"{1 / ratio:.2f}x {worse}"
    return Figure(key, label, show(before), show(after), change, ratio > 1, after / before)


def _accuracy(before: float, after: float) -> Figure:
    points = 100 * (after - before)
    change = f"{points:+.2f} points" if abs(points) >= 0.005 else "same"
    better = points > 0 if points else None
    return Figure("accuracy", "Accuracy", percent(before), percent(after), change, better)


def _perplexity(before: float, after: float) -> Figure:
    change = f"{after / before - 1:+.1%}".replace("%", " %") if before != after else "same"
    better = None if before == after else after < before
    return Figure("perplexity", "Perplexity", number(before), number(after), change, better)


def _milliseconds(value: float) -> str:
    return f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def _latencies(summary: Mapping[str, Any]) -> list[Figure]:
    found = sorted({(m[2] or "", int(m[3]), m[1]) for m in map(_LATENCY.fullmatch, summary) if m})
    names = {"p50": "median"}
    figures = []
    for runtime, batch, quantile in found:
        before = summary.get(f"latency_ms/{quantile}/{runtime}before/b{batch}")
        after = summary.get(f"latency_ms/{quantile}/{runtime}after/b{batch}")
        if before is not None and after is not None:
            where = " in ONNX Runtime" if runtime else " in PyTorch, float" if _quantized(summary) else ""
            label = f"Latency{where} {names.get(quantile, quantile)}, batch {batch}"
            key = f"latency_ms/{quantile}/{runtime}b{batch}"
            figures.append(_cost(key, label, before, after, _milliseconds, "faster", "slower"))
    return figures


def _quantized(summary: Mapping[str, Any]) -> bool:
    return "fingerprint/scales" in summary


def _files(summary: Mapping[str, Any]) -> list[Figure]:
    """What a quantized model is delivered as, file by file, beside the float model, in the same format if that is
    known; of any other model what its weights take."""
    names = sorted(m[1] for m in map(_FILE.fullmatch, summary) if m) if _quantized(summary) else []
    deployed = [name for name in names if name != "safetensors"]  # which holds floats
    figures = []
    for name in deployed or [""]:
        before = summary.get(f"file_bytes/{name}/before", summary.get("file_bytes/before"))
        after = summary.get(f"file_bytes/{name}/after" if name else "file_bytes/after")
        if before is not None and after is not None:
            key, label = (f"file_bytes/{name}", f"File size, {name}") if name else ("file_bytes", "File size")
            figures.append(_cost(key, label, before, after, size_bytes, "smaller", "larger"))
    return figures


def _place(key: str) -> tuple[int, str]:
    known = ["accuracy", "perplexity", *_COSTS]
    return (known.index(key), "") if key in known else (len(known), key)


def target(row: Mapping[str, Any]) -> dict[str, str]:
    """{wish, got, share}: what was asked of a target, what went, and the part of it that is left, in words."""
    wish = "" if row["asked"] is None else f"{100 * row['asked']:.4g} %"
    if row["group"]:
        wish = f"{wish} in {row['group']}".strip() if wish else row["group"]
    share = row["removed"] / row["num"] if row["num"] else 0.0
    got = f"{number(row['removed'])} of {number(row['num'])} {row['unit']}"
    return {"wish": wish or "a threshold", "got": got, "share": percent(share, 1)}


Table = tuple[list[str], list[list[Any]]]  # names of columns, rows


def tables(targets: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """The tables of pruning by name, for W&B: numbers stay numbers."""
    asked = ["target", "asked", "removed", "units", "unit", "group", "why it differs"]
    own = [[r["name"], r["asked"], r["removed"], r["num"], r["unit"], r["group"], r["reason"]] for r in targets]
    pairs = [f"{name}{when}" for name in ("", "params_", "macs_") for when in ("before", "after")]
    each = [[row["name"], *(row[pair] for pair in pairs)] for row in layers]
    found = {"targets": (asked, own), "layers": (["layer", "channels_before", "channels_after", *pairs[2:]], each)}
    return {name: table for name, table in found.items() if table[1]}


def limits(summary: Mapping[str, Any]) -> list[Limit]:
    """What `pruning.at_most` asked of the whole model, and what became of it."""
    found = []
    for unit, label in _LIMITS.items():
        if f"at_most/{unit}/asked" in summary:
            asked, predicted, reached = (summary[f"at_most/{unit}/{n}"] for n in ("asked", "predicted", "reached"))
            show = _milliseconds if unit == "latency_ms" else count
            over = reached / asked - 1
            verdict = "held" if over <= 0 else f"missed by {percent(over, 1)}"
            verdict += ", binding" if summary.get(f"at_most/{unit}/binding") else ""
            found.append(Limit(unit, label, show(asked), show(predicted), show(reached), verdict, over <= 0))
    return found


def before_after(summary: Mapping[str, Any]) -> list[Figure]:
    """The rows of the table: accuracy, perplexity, costs, latencies, then any other `<name>/before` with an
    `/after`."""
    figures, others = [], []
    names = [key.removesuffix("/before") for key in summary if key.endswith("/before")]
    for key in sorted(names, key=_place):
        before, after = summary[f"{key}/before"], summary.get(f"{key}/after")
        if before is None or after is None:
            continue
        if key == "accuracy":
            figures.append(_accuracy(before, after))
        elif key == "perplexity":
            figures.append(_perplexity(before, after))
        elif key in _COSTS:
            figures.append(_cost(key, _COSTS[key], before, after, count, "smaller", "larger"))
        elif not key.startswith("file_bytes"):
            others.append(Figure(key, key[:1].upper() + key[1:], number(before), number(after), "", None))
    return figures + _files(summary) + _latencies(summary) + others
