"""Rows of the table of quantized tensors; what of a quantized model is shown before and after."""

import io

from rich.console import Console

from dist_compress.reporting import console, figures, report
from dist_compress.reporting.quantized import quantized_tensor

ROW = {
    "module": "conv1", "target": "weight", "quant_dtype": "int8", "quant_scheme": "symmetric_restricted",
    "granularity": "PerChannel", "low": -1.5, "high": 2.0, "scale": [0.01, 0.02], "zero_point": [0, 0],
    "sqnr_db": 41.26, "clipped": 0.00125,
}  # fmt: skip


def test_a_row_as_text():
    assert quantized_tensor(ROW) == {
        "name": "conv1.weight", "type": "int8 symmetric restricted", "range": "-1.5 to 2", "scale": "0.01 to 0.02",
        "zero_point": "0", "sqnr": "41.3 dB", "clipped": "0.125%",
    }  # fmt: skip


def test_dynamic_scales_and_what_was_never_seen():
    empty = {**ROW, "scale": None, "zero_point": None, "low": None, "sqnr_db": None, "clipped": None}
    found = quantized_tensor(empty)
    assert found["scale"] == found["zero_point"] == "dynamic"
    assert found["range"] == found["sqnr"] == found["clipped"] == ""


def test_the_table_shows_the_files_that_are_delivered():
    times = {f"latency_ms/p50/onnx/{when}/b1": ms for when, ms in (("before", 4.0), ("after", 2.0))}
    sizes = {"file_bytes/before": 1000, "file_bytes/after": 1010, "file_bytes/safetensors/after": 1020}
    onnx = {"file_bytes/onnx/before": 1200, "file_bytes/onnx/after": 400, "file_bytes/torchao/after": 250}
    simulated = {**sizes, "fingerprint/scales": "12"}
    rows = {row.label: row for row in figures.before_after({**simulated, **onnx, **times})}
    assert list(rows) == ["File size, onnx", "File size, torchao", "Latency in ONNX Runtime median, batch 1"]
    assert [row.change for row in rows.values()] == ["3.00x smaller", "4.00x smaller", "2.00x faster"]
    assert [row.label for row in figures.before_after(simulated)] == ["File size"]  # nothing else to deliver
    assert [row.label for row in figures.before_after({**sizes, **onnx})] == ["File size"]  # not quantized
    pruned = {**simulated, "latency_ms/p50/before/b1": 3.0, "latency_ms/p50/after/b1": 2.0}
    assert figures.before_after(pruned)[-1].label == "Latency in PyTorch, float median, batch 1"


def test_the_first_figures_of_a_quantized_model():
    rows = figures.before_after(
        {
            "accuracy/before": 0.9, "accuracy/after": 0.9, "macs/before": 5, "macs/after": 5, "params/before": 3,
            "params/after": 3, "file_bytes/onnx/before": 4, "file_bytes/onnx/after": 1, "fingerprint/scales": "1",
            "latency_ms/p50/onnx/before/b32": 2.0, "latency_ms/p50/onnx/after/b32": 1.0,
        }
    )  # fmt: skip
    assert [row.key for row in report._headlines(rows)] == ["accuracy", "file_bytes/onnx", "latency_ms/p50/onnx/b32"]


def test_checks_on_the_console():
    summary = {
        "export/onnx/top1_agreement": 0.99, "export/onnx/max_diff": 1.5, "verify/folded_max_rel_diff": 1e-6,
        "env/int8_dot_products": "none",
    }  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=110).print(console.summary_table(summary))
    shown = " ".join(out.getvalue().split())
    assert "File of onnx vs simulated" in shown and "1.50 units, 99.0 % agree" in shown and "none" in shown
