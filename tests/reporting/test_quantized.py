"""Rows of the table of quantized tensors."""

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
