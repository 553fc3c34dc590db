"""Pictures of pruning: every bar and cell against the numbers it stands for; the same shapes as SVG and PNG."""

from __future__ import annotations

import io
import xml.etree.ElementTree as xml
from typing import Any

import pytest
from PIL import Image

from dist_compress.reporting import console, figures, pictures
from dist_compress.reporting.drawing import Drawing, Rect, Text

KEPT = [{"name": "a", "kept": "1100"}, {"name": "deep.b<c>", "kept": "1" * 300 + "0" * 300}]
LAYERS = [
    {"name": "a", "before": 4, "after": 2, "params_before": 8, "params_after": 4, "macs_before": 100, "macs_after": 25},
    {"name": "b", "before": 8, "after": 8, "params_before": 8, "params_after": 4, "macs_before": 50, "macs_after": 50},
]
SCORES = [
    {"step": step, "name": name, "edges": [0.0, 1.0, 2.0], "kept": [1, 3], "removed": [2, 0]}
    for step in range(9)
    for name in ("g", "h", "i", "j", "k")
]
TARGETS = [
    {"name": "a", "unit": "channels", "num": 4, "removed": 2, "asked": 0.45, "group": "", "reason": "whole ones only"},
    {"name": "b", "unit": "channels", "num": 8, "removed": 3, "asked": 0.5, "group": "global_group_id=x", "reason": ""},
    {"name": "c", "unit": "weights", "num": 9, "removed": 0, "asked": None, "group": "", "reason": "scores below 1"},
]


def rects(drawing: Drawing, kind: str) -> list[Rect]:
    return [item for item in drawing.items if isinstance(item, Rect) and item.kind == kind]


def texts(drawing: Drawing) -> list[str]:
    return [item.text for item in drawing.items if isinstance(item, Text)]


def test_cells_of_the_map() -> None:
    drawing = pictures.kept_map(KEPT)
    tracks, cells = rects(drawing, "track"), rects(drawing, "kept")
    assert len(tracks) == 2 and {"2 / 4", "300 / 600"} <= set(texts(drawing))
    small = [cell for cell in cells if cell.y == tracks[0].y]
    assert len(small) == 2 and small[0].x == tracks[0].x
    assert small[1].x + small[1].width == pytest.approx(tracks[0].x + tracks[0].width / 2, abs=1)
    wide = [cell for cell in cells if cell.y == tracks[1].y]
    assert sum(cell.width for cell in wide) == pytest.approx(tracks[1].width / 2, rel=1e-6)  # 200 cells of 3 channels


def test_columns() -> None:
    drawing = pictures.layer_columns("MACs", LAYERS, "macs_before", "macs_after")
    before, after = rects(drawing, "track"), rects(drawing, "kept")
    assert [a.height / before[0].height for a in after] == pytest.approx([0.25, 0.5])
    assert [b.height / before[0].height for b in before] == pytest.approx([1, 0.5])
    drawing = pictures.layer_columns("kept", LAYERS, "before", "after", relative=True)
    pairs = zip(rects(drawing, "kept"), rects(drawing, "track"), strict=True)
    assert [a.height / b.height for a, b in pairs] == [0.5, 1]
    assert "100 %" in texts(drawing)


def test_panels() -> None:
    drawing = pictures.score_panels(SCORES)
    assert drawing is not None
    told = texts(drawing)
    assert [told.count(name) for name in "ghijk"] == [4] * 5  # 20 of the 24 there may be
    assert {t for t in told if t.startswith("step")} == {"step 0", "step 3", "step 5", "step 8"}
    kept, gone = rects(drawing, "kept")[:2], rects(drawing, "gone")[:1]
    assert [bar.height / gone[0].height for bar in kept] == pytest.approx([0.5, 1.5])
    assert kept[0].y + kept[0].height == pytest.approx(gone[0].y)  # stacked
    assert pictures.score_panels([{**SCORES[0], "edges": [], "kept": [], "removed": []}]) is None


@pytest.mark.parametrize("drawing", pictures.drawn(LAYERS, KEPT, SCORES).values())
def test_as_svg_and_as_png(drawing: Drawing) -> None:
    root = xml.fromstring(drawing.svg())
    assert len([e for e in root if e.tag == "rect"]) == sum(isinstance(item, Rect) for item in drawing.items)
    image = Image.open(io.BytesIO(drawing.png()))
    assert image.size == (round(2 * drawing.width), round(2 * drawing.height))
    kept = rects(drawing, "kept")[0]
    middle = (int(2 * (kept.x + kept.width / 2)), int(2 * (kept.y + kept.height / 2)))
    assert image.convert("RGB").getpixel(middle) == (0x2B, 0x63, 0xD9)


def test_nothing_to_draw_is_not_drawn() -> None:
    assert pictures.drawn([], [], []) == {}
    assert set(pictures.drawn(LAYERS, [], [])) == {"kept part of the layers", "MACs of the layers"}


def test_targets_in_words_and_tables() -> None:
    said = [figures.target(row) for row in TARGETS]
    assert [row["wish"] for row in said] == ["45 %", "50 % in global_group_id=x", "a threshold"]
    assert [row["share"] for row in said] == ["50.0 %", "37.5 %", "0.0 %"] and said[1]["got"] == "3 of 8 channels"
    tables = figures.tables(TARGETS, LAYERS)
    assert tables["targets"][1][0] == ["a", 0.45, 2, 4, "channels", "", "whole ones only"]
    assert tables["layers"][1][0] == ["a", 4, 2, 8, 4, 100, 25] and len(tables["layers"][0]) == 7
    assert figures.tables([], []) == {}
    shown = console.target_table(TARGETS * 20, most=40)
    assert shown.row_count == 40 and shown.caption == "20 more targets are in report.html"


def limited(**reached: Any) -> dict[str, Any]:
    return {
        f"at_most/{unit}/{name}": value
        for unit, asked, got in (("macs", 20e6, reached["macs"]), ("latency_ms", 5.0, reached["latency_ms"]))
        for name, value in (("asked", asked), ("predicted", got), ("reached", got))
    }


def test_limits_held_and_missed() -> None:
    macs, latency = figures.limits(limited(macs=19.9e6, latency_ms=5.5))
    assert (macs.asked, macs.reached, macs.verdict, macs.held) == ("20.00 M", "19.90 M", "held", True)
    assert (latency.asked, latency.verdict, latency.held) == ("5.00 ms", "missed by 10.0 %", False)
    bound = figures.limits({**limited(macs=19.9e6, latency_ms=5.5), "at_most/macs/binding": True})
    assert [limit.verdict for limit in bound] == ["held, binding", "missed by 10.0 %"]
    assert figures.limits({"macs/after": 3}) == []
    assert console.summary_table(limited(macs=1, latency_ms=1.0)).row_count == 2
