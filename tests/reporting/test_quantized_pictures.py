"""Pictures and W&B tables of quantization: every bar against the number it stands for, and where they are shown."""

from __future__ import annotations

import io
import xml.etree.ElementTree as xml
from typing import Any

import pytest
from PIL import Image

from dist_compress.reporting import quantized, quantized_pictures
from dist_compress.reporting.drawing import Drawing, Rect, Text
from dist_compress.reporting.report import write_report


def tensor(module: str, target: str, decibels: float | None, dtype: str = "int8") -> dict[str, Any]:
    return {
        "module": module, "target": target, "quant_dtype": dtype, "quant_scheme": "affine", "granularity": "PerTensor",
        "low": -1.0, "high": 2.0, "scale": [0.1, 0.2], "zero_point": [3, 3], "sqnr_db": decibels, "clipped": 0.0,
    }  # fmt: skip


TENSORS = [tensor("a", "_input_0", 40.0), tensor("a", "weight", 20.0), tensor("b<c>", "weight", None)]
SENSITIVITY = [
    {"name": "a.weight", "quant_dtype": "int4", "loss": 0.1, "bytes": 50, "chosen": False},
    {"name": "a.weight", "quant_dtype": "int8", "loss": 0.001, "bytes": 100, "chosen": True},
    {"name": "b<c>.weight", "quant_dtype": "int4", "loss": -0.02, "bytes": 500, "chosen": True},
    {"name": "b<c>.weight", "quant_dtype": "int8", "loss": 0.01, "bytes": 1000, "chosen": False},
]


def rects(drawing: Drawing, kind: str) -> list[Rect]:
    return [item for item in drawing.items if isinstance(item, Rect) and item.kind == kind]


def texts(drawing: Drawing) -> list[str]:
    return [item.text for item in drawing.items if isinstance(item, Text)]


def test_columns_of_the_noise():
    d = quantized_pictures.noise(TENSORS)
    (source,), (weight, unknown) = rects(d, "gone"), rects(d, "kept")
    assert source.height == pytest.approx(2 * weight.height) and unknown.height == 0
    assert source.tip == "a._input_0, int8: 40.0 dB" and "exact, or never seen" in unknown.tip
    assert source.x < weight.x < unknown.x and source.y + source.height == pytest.approx(weight.y + weight.height)
    assert {"0 dB", "40 dB", "a", "b<c>"} <= set(texts(d))


def test_bars_of_the_sensitivity():
    """From 0.001 to 0.1: 0.01 is half way, what did not rise is a dot, and so is the least."""
    d = quantized_pictures.sensitivity_bars(SENSITIVITY)
    chosen, others = rects(d, "kept"), rects(d, "gone")
    assert [r.tip for r in chosen] == ["a.weight as int8: loss +0.001, 100 B", "b<c>.weight as int4: loss -0.02, 500 B"]
    assert [r.width for r in chosen] == [3.0, 3.0]
    assert others[1].width == pytest.approx(others[0].width / 2)
    ticks = [item for item in d.items if isinstance(item, Text) and item.text in ("0.001", "0.01", "0.1")]
    assert [t.x for t in ticks] == pytest.approx([others[0].x + others[0].width * part for part in (0, 0.5, 1)])
    assert {"int8, 100 B", "int4, 500 B", "a.weight"} <= set(texts(d))


@pytest.mark.parametrize("rise", [0.0, -1.0, 1.0, 1e-9])
def test_rises_of_any_kind_can_be_drawn(rise):
    rows = [{**row, "loss": rise, "chosen": False} for row in SENSITIVITY] * 40  # many, and nothing chosen
    d = quantized_pictures.sensitivity_bars(rows)
    assert len(rects(d, "kept")) == 160 and not rects(d, "gone")
    assert all(0 < r.width <= d.width and r.y + r.height <= d.height for r in rects(d, "kept"))


def test_the_same_shapes_as_svg_and_png():
    for d in quantized_pictures.drawn(TENSORS, SENSITIVITY).values():
        svg = xml.fromstring(d.svg())
        assert len(svg.findall(".//rect")) == len([item for item in d.items if isinstance(item, Rect)])
        assert Image.open(io.BytesIO(d.png())).size == (round(2 * d.width), round(2 * d.height))
    assert quantized_pictures.drawn([], []) == {}
    both = quantized_pictures.drawn(TENSORS, SENSITIVITY), quantized.tables(TENSORS, SENSITIVITY)
    assert not both[0].keys() & both[1].keys()  # in W&B they are panels of one section
    assert list(quantized_pictures.drawn([tensor("a", "weight", None)], [])) == []


def test_tables_hold_numbers():
    found = quantized.tables([*TENSORS, {**TENSORS[0], "scale": None, "zero_point": None}], SENSITIVITY)
    columns, rows = found["tensors"]
    first, dynamic = (dict(zip(columns, rows[i], strict=True)) for i in (0, 3))
    assert first["tensor"] == "a._input_0" and first["scale_max"] == 0.2 and first["sqnr_db"] == 40.0
    assert dynamic["scale_min"] is None and dynamic["zero_point_max"] is None
    assert found["sensitivity"] == (
        ["weight", "quant_dtype", "loss", "bytes", "chosen"], [list(row.values()) for row in SENSITIVITY],
    )  # fmt: skip
    assert quantized.tables([], []) == {}


def test_the_page_shows_both(tmp_path):
    common: dict[str, Any] = {
        "config_yaml": "{}", "summary": {}, "layers": [], "asked_but_kept": [], "history": [], "metrics": [],
        "decisions": [],
    }  # fmt: skip
    page = write_report(tmp_path, **common, quantized=TENSORS, sensitivity=SENSITIVITY).read_text()
    assert "Sensitivity of the weights" in page and "rise of the loss with each of 2 weights" in page
    assert "signal to noise ratio of 3" in page and "b&lt;c&gt;.weight" in page and "+0.001" in page
    assert "Sensitivity of the weights" not in write_report(tmp_path, **common, quantized=TENSORS).read_text()
