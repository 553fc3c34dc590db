"""The report page: complete, self-contained, escaped, well-formed."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dist_compress.reporting import charts, report

CONFIG = """seed: 0
model:
  source: cifar
  name: resnet20
data:
  source: digits
pruning:
  method: taylor
  sparse_ratio: 0.5
  compute: macs
  schedule:
    name: agp
speedup:
  tolerance: 1.0e-05
"""


def layers() -> list[dict[str, Any]]:
    rows = [layer("conv1", 3, 16, 14)]
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            inner = round(width * (0.35 + 0.08 * block))
            outer = round(width * (0.62 if stage > 1 else 0.875))
            rows.append(layer(f"layer{stage}.{block}.conv1", width, width, inner))
            rows.append(layer(f"layer{stage}.{block}.conv2", width, width, outer))
    return rows


def layer(name: str, inputs: int, before: int, after: int) -> dict[str, Any]:
    params, left = 9 * inputs * before, 9 * inputs * after * 3 // 4
    row = {"name": name, "before": before, "after": after, "params_before": params, "params_after": left}
    return {**row, "macs_before": params * 1024, "macs_after": left * 1024}


def metrics(steps: int = 240) -> list[dict[str, Any]]:
    rows = []
    for step in range(4, steps, 5):
        wobble = 0.08 * math.sin(step * 1.7) + 0.05 * math.cos(step * 0.61)
        row = {
            "step": step,
            "time": 1e9 + step,
            "train/loss": 0.12 + 2.2 * math.exp(-step / 35) + abs(wobble),
            "train/accuracy": min(0.995, 1 - 0.85 * math.exp(-step / 30) + 0.02 * wobble),
            "train/lr": 0.05 * (1 + math.cos(math.pi * step / steps)),
            "pruning/sparse_ratio": 0.5 * (1 - (1 - min(1.0, max(0, step - 55) / 80)) ** 3),
            "train/grad_norm": 2.0 + 8 * math.exp(-step / 50) + wobble,
        }
        if step % 40 == 39:
            row["eval/accuracy"] = 0.978 - 0.6 * math.exp(-step / 25)
            row["eval/loss"] = 0.09 + 1.4 * math.exp(-step / 30)
        rows.append(row)
    return rows


def latency(batch: str, before: tuple[float, float], after: tuple[float, float]) -> dict[str, float]:
    return {
        f"latency_ms/{quantile}/{when}/{batch}": value
        for when, pair in (("before", before), ("after", after))
        for quantile, value in zip(("p50", "p90"), pair, strict=True)
    }


def arguments() -> dict[str, Any]:
    """A run as the runner reports it."""
    summary = {
        "accuracy/before": 0.98055,
        "accuracy/masked": 0.975,
        "accuracy/shrunk": 0.975,
        "accuracy/after": 0.97778,
        "params/before": 272474,
        "params/after": 138211,
        "macs/before": 40813184,
        "macs/after": 19412736,
        "file_bytes/before": 1103972,
        "file_bytes/after": 566848,
        **latency("b1", (3.912, 4.377), (2.871, 3.155)),
        **latency("b32", (41.82, 44.9), (22.37, 24.13)),
        "verify/max_rel_diff": 3.128e-7,
        "fingerprint/masks": 0xD1E5C0DE12345678,
        "fingerprint/weights": 77,
        "world_size": 2,
        "backend": "ddp",
        "versions/torchvision": "0.29.0",
    }
    decisions = [
        {
            "step": 60 + 16 * i,
            "ratio": 0.5 * (1 - (1 - (i + 1) / 6) ** 3),
            "fingerprint": 0xABCDEF0123456789 + i * 999983,
        }
        for i in range(6)
    ]
    return {
        "config_yaml": CONFIG,
        "summary": summary,
        "layers": layers(),
        "asked_but_kept": [
            {
                "name": "layer1.0.conv2",
                "asked": 0.5,
                "given": 0.125,
                "reason": "max_sparse_ratio of its group",
            },
            {
                "name": "conv1",
                "asked": 8,
                "given": 2,
                "reason": "shares its channels with layer1.*.conv2 (addition)",
            },
        ],
        "history": [
            *({"step": 60 + 16 * i, "text": f"pruned to {i + 1}/6 of the target"} for i in range(6)),
            {"step": 140, "time": 3.0, "text": "shrunk: 40.81 M -> 19.41 M MACs"},
        ],
        "metrics": metrics(),
        "decisions": decisions,
    }


class Checker(HTMLParser):
    """Every element is closed in order; collects text, tags and attributes."""

    VOID = {"meta", "link", "br", "hr", "img", "input"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def written(tmp_path: Path, **changes: Any) -> str:
    return report.write_report(tmp_path, **{**arguments(), **changes}).read_text(encoding="utf-8")


def test_well_formed_and_self_contained(tmp_path: Path) -> None:
    page = written(tmp_path)
    seen = check(page)
    assert page.startswith("<!doctype html>") and "script" not in seen.tags
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.partition("<pre>")[0])
    fetched = [value for name, value in seen.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert fetched == ["data:,"]
    assert "prefers-color-scheme: dark" in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_says_all_it_was_told(tmp_path: Path) -> None:
    text = " ".join(check(written(tmp_path)).text)
    told = arguments()
    for key, value in told["summary"].items():
        assert key in text and str(value) in text, key
    for row in told["layers"]:
        assert all(str(value) in text for value in row.values()), row
    for row in told["decisions"]:
        assert f"{row['fingerprint']:016x}" in text and str(row["step"]) in text
    for row in told["asked_but_kept"]:
        assert row["name"] in text and row["reason"] in text
    for row in told["history"]:
        assert row["text"] in text
    for shown in (
        "97.50 %",
        "97.78 %",
        "-0.28 points",
        "2.10x",
        "1.87x",
        "3.13e-07",
        "1e-05",
        "566.85 kB",
        "0.29.0",
    ):
        assert shown in text, shown
    assert "resnet20 on digits" in text and "sparse_ratio: 0.5" in text
    for curve in ("Loss", "Accuracy", "Learning rate", "Sparse ratio", "train/grad_norm"):
        assert curve in text


def test_pictures_and_tables_of_pruning(tmp_path: Path) -> None:
    evil = "<b>&"
    kept = [{"name": evil, "kept": "1010"}]
    row = {"name": "conv1", "unit": "channels", "num": 16, "removed": 2, "asked": 0.5, "group": "", "reason": evil}
    scores = [{"step": 60, "name": evil, "edges": [0.1, 0.2, 0.4], "kept": [1, 2], "removed": [3, 0]}]
    limits = {"at_most/macs/asked": 2e7, "at_most/macs/predicted": 1.9e7, "at_most/macs/reached": 2.1e7}
    summary = {**arguments()["summary"], **limits}
    page = written(tmp_path, targets=[row] * 31, kept_channels=kept, scores=scores, summary=summary)
    text = " ".join(check(page).text)
    assert page.count('class="drawing"') == 3 and evil not in page
    titles = ("Which channels", "MACs of each layer", "Scores at the decisions")
    for shown in (*titles, "missed by 5.0 %", "1 more targets"):
        assert shown in text, shown
    assert "2 of 16 channels" in text and "Also kept" in text
    assert text.count("shares its channels with layer1") == 0  # of conv1, which the table of targets has
    many = written(tmp_path, layers=[layer(f"l{i}", 4, 8, 4) for i in range(60)])
    assert "Layer by layer" in many and many.count('class="drawing"') == 2
    check(many)


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script><b title=\"&\">"
    page = written(
        tmp_path,
        config_yaml=f"model: {{name: {json.dumps(evil)}}}\n",
        summary={"fingerprint/masks": evil, "backend": evil, "world_size": 1, evil: evil, "versions/x": evil},
        layers=[{**layer("a", 3, 8, 4), "name": evil}],
        asked_but_kept=[{"name": evil, "asked": 0.5, "given": 0.0, "reason": evil}],
        history=[{"step": 1, "text": evil, evil: 2}],
        metrics=[{"step": 1, "train/loss": 1.0, f"{evil}/loss": 2.0, evil: 3.0}],
        decisions=[{"step": 1, "ratio": 0.5, "fingerprint": evil}],
    )
    seen = check(page)
    assert "script" not in seen.tags and "b" not in seen.tags
    assert "alert" in "".join(seen.text)


def test_a_mismatch_is_not_praised(tmp_path: Path) -> None:
    bad = {**arguments()["summary"], "verify/max_rel_diff": 2e-3}
    page = written(tmp_path, summary=bad)
    assert "is not the masked model" in page and "proof no" in page
    assert "computes what the masked model computed" not in page
    assert "proof yes" in written(tmp_path)


def test_little_is_enough(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {key: [] for key in arguments() if key not in ("config_yaml", "summary")}
    page = written(tmp_path, config_yaml="", summary={}, **nothing)
    check(page)
    assert f"<h1>{tmp_path.name}</h1>" in page and "Nothing: all that the configuration asked" in page


def test_kept_although_asked(tmp_path: Path) -> None:
    """Of 16 channels 8 were to go (said as a count, or as a ratio) and 14 stayed: striped from 50 % on."""
    for name, asked in (("conv1", 8), ("conv1", 0.5), ("conv1.weight[dim 0]", 8)):
        row = {"name": name, "asked": asked, "given": 2, "reason": "r"}
        page = written(tmp_path, asked_but_kept=[row])
        assert '<i style="width:87.50%"></i><s style="left:50.00%;width:37.50%">' in page
    inputs = {"name": "conv1.weight[dim 1]", "asked": 8, "given": 2, "reason": "r"}
    assert "<s style" not in written(tmp_path, asked_but_kept=[inputs])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.2, 97, [0, 25, 50, 75, 100]), (5, 5, [2, 4, 6, 8])],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_thinning_keeps_the_spikes() -> None:
    points = [(float(i), 0.0) for i in range(100_000)]
    points[777], points[50_001] = (777.0, 9.0), (50_001.0, -9.0)
    kept = charts.thin(points)
    assert len(kept) <= 600 and points[777] in kept and points[50_001] in kept
    assert kept == sorted(kept)


def test_one_constant_point_can_be_drawn() -> None:
    check(charts.line_chart("x", {"a": [(0.0, 0.0)]}))
    check(charts.line_chart("x", {"a": [(7.0, -3.0)]}, steps=True, marks={7: "m"}))
