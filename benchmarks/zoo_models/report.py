"""The results as Markdown: a summary of each suite, then a row for each model."""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]


def markdown(rows: list[Row], versions: dict[str, str]) -> str:
    """`zoo.md`. Rows of a suite keep their order."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    parts = [_INTRODUCTION.format(versions=", ".join(f"{k} {v}" for k, v in versions.items()))]
    parts += [_summary({suite: [row for row in rows if row["suite"] == suite] for suite in suites})]
    for suite in suites:
        parts += [f"## {suite}\n", _table([row for row in rows if row["suite"] == suite])]
    return "\n".join(parts)


_INTRODUCTION = """# Zoo

    python benchmarks/zoo.py
    python benchmarks/zoo.py --report

{versions}.
Random weights, small inputs, one CPU thread, a process and a time limit for each model. Written by the
script from `zoo.jsonl`.

- captured: `concrete_trace` works; new input, new batch: its graph gives what the model gives on other inputs, at 2 and
  3 samples (n/a: a list of more images has no place in a graph).
- 30 %, 50 %: that share of the units of every group that `coupling` calls free is masked at random; the plan is made
  and applied to a copy, and the small model gives what the masked one gives on new inputs and at another batch size, in
  float64 within 1e-9 of the largest output (f32: within 1e-4, where the model's own code computes in float32), while
  the masked one differs from the dense one by more than 1e-7.
- counts: captured, both plans verified, and one of them removed 20 % of the parameters or more.
- unable: of those in which nothing can go, the ones where this was checked by hand: bit standardises its weights, so
  that each depends on all input channels, and a row of zeros is a constant behind the norm. The rest are failures.
- norm: the setting that counted. `keep` leaves the width under LayerNorm and RMSNorm as it is; `exact`, tried where
  `keep` removed less than 20 %, exchanges these norms for ones that divide by the old width.

"""


def _summary(suites: dict[str, list[Row]]) -> str:
    head = ["suite", "models", "families", "captured", "new input", "new batch", "30 %", "50 %", "counts",
            "families that count", "unable", "failures"]  # fmt: skip
    lines = []
    for suite, rows in suites.items():
        counted = [row for row in rows if not row.get("failure")]
        families, good = {row["family"] for row in rows}, {row["family"] for row in counted}
        failures = Counter(row["failure"] for row in rows if row.get("failure") and not _unable(row))
        lines.append([
            suite, len(rows), len(families), _count(rows, "captured"), _of(rows, "replay_new"),
            _of(rows, "replay_batch"), *(sum(_plan_holds(row, share) for row in rows) for share in ("30%", "50%")),
            len(counted), f"{len(good)} ({len(good) / len(families):.0%})", sum(map(_unable, rows)),
            ", ".join(f"{name} {count}" for name, count in failures.most_common()) or "none",
        ])  # fmt: skip
    return _markdown_table(head, lines)


def _table(rows: list[Row]) -> str:
    head = ["model", "params", "captured", "input", "batch", "30 %", "50 %", "norm", "difference", "CPU s", "result",
            "what stays, with the number of units"]  # fmt: skip
    lines = []
    for row in rows:
        plans = row.get("plans", {})
        errors = [plan[key] for plan in plans.values() for key in ("new", "batch") if key in plan]
        stays = "; ".join(f"{why} ({count})" for why, count in row.get("blocked", [])[:2])
        lines.append([
            row["name"], f"{row.get('params', 0) / 1e6:.2f} M", *(_mark(row, key) for key in _REPLAY),
            *(f"-{plans[share]['removed']:.0%}" if share in plans else "" for share in ("30%", "50%")),
            row.get("norm", "") + (" f32" if _single(row) else ""),
            f"{max(errors):.0e}" if errors else "", f"{sum(row['seconds'].values()):.1f}",
            "counts" if not row.get("failure") else f"{row['failure']}: {row['detail'][:160]}", stays,
        ])  # fmt: skip
    return _markdown_table(head, lines)


_UNABLE = ("bit",)
_REPLAY = ("captured", "replay_new", "replay_batch")


def _unable(row: Row) -> bool:
    return row.get("failure") == "nothing can go" and row["name"] in _UNABLE


def _single(row: Row) -> bool:
    return any(part.get("precision") == "float32" for part in (row, *row.get("plans", {}).values()))


def _plan_holds(row: Row, share: str) -> bool:
    return "batch" in row.get("plans", {}).get(share, {})


def _count(rows: list[Row], key: str) -> int:
    return sum(bool(row.get(key)) for row in rows)


def _of(rows: list[Row], key: str) -> str:
    """How many of those that were asked."""
    return f"{_count(rows, key)} of {sum(key in row for row in rows)}"


def _mark(row: Row, key: str) -> str:
    return "n/a" if key not in row else "yes" if row[key] else "no"


def _markdown_table(head: list[str], lines: list[list[Any]]) -> str:
    cells = [[str(cell).replace("|", "/") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells]) + "\n"
