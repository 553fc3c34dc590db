"""Whole quantized runs: the same bits on 1 to 3 ranks, killed and resumed, pruned before, and what is delivered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import killed_at

QUICK = [
    "+recipe=resnet_qat",
    "logger=none",
    "data.image_size=12",
    "train.max_steps=6",
    "train.global_batch_size=24",
    "train.micro_batch_size=4",
    "train.eval_batch_size=90",
    "quantization.calibration_steps=2",
    "quantization.freeze=5steps",
    "quantization.start=2steps",
    "export=[safetensors]",
]


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run

    outcome.LATENCY_S = 0.1  # no test here looks at it
    Path(run_dir).mkdir(exist_ok=True)
    run.run(compose.compose(compose.parse([*QUICK, *overrides, f"run_dir={run_dir}"])))
    facts = json.loads((Path(run_dir) / "facts.json").read_text())
    return {**json.loads((Path(run_dir) / "summary.json").read_text()), "rows": facts["methods"]["quantization"]}


def killed_run(run_dir: str, step: int, *overrides: str) -> None:
    with killed_at(step):
        whole_run(run_dir, *overrides)


def bits(summary: dict[str, Any]) -> dict[str, Any]:
    names = ("fingerprint/weights", "fingerprint/scales", "loss/before", "loss/quantized", "loss/after", "rows")
    return {name: summary[name] for name in names}


@pytest.fixture(scope="module")
def one_rank(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, whole_run, str(tmp_path_factory.mktemp("one")), timeout_s=110)[0]


def test_trained_quantization_has_the_same_bits_on_any_number_of_ranks(ranks, tmp_path, one_rank):
    for n in (2, 3):
        for found in ranks(n, whole_run, str(tmp_path / str(n)), timeout_s=110):
            assert bits(found) == bits(one_rank), n
    assert one_rank["loss/quantized"] != one_rank["loss/before"]
    assert one_rank["verify/folded_max_rel_diff"] < 1e-5
    assert len(one_rank["rows"]) == 2 * 20 + 2 * 9 and all(row["sqnr_db"] > 15 for row in one_rank["rows"])


def test_killed_and_resumed(ranks, tmp_path, one_rank):
    """After quantization began, with observers still moving."""
    ranks(2, killed_run, str(tmp_path), 4, "checkpoint.every_steps=1", timeout_s=110)
    assert not (tmp_path / "summary.json").exists()
    for found in ranks(2, whole_run, str(tmp_path), "checkpoint.every_steps=1", timeout_s=110):
        assert bits(found) == bits(one_rank)


def delivered_run(run_dir: str, *overrides: str) -> tuple[dict[str, Any], bool]:
    """The summary, and whether the model that is loaded computes what the file of the run says."""
    import dist_compress

    summary = whole_run(run_dir, *overrides)
    model = dist_compress.load(run_dir)
    level = model.conv1.weight / model.conv1.quantizer_weight.scale
    return summary, bool((level - level.round()).abs().max() < 1e-3 and model.conv1.bias is not None)


def test_ptq_trains_nothing_and_is_delivered_as_onnx(ranks, tmp_path):
    more = ["quantization=ptq", "quantization.start=null", "quantization.freeze=1.0", "train.max_steps=2"]
    summary, whole = ranks(1, delivered_run, str(tmp_path), *more, "export=[safetensors,onnx]", timeout_s=110)[0]
    assert whole and summary["export/safetensors/max_rel_diff"] == 0.0
    assert summary["export/onnx/max_diff"] < 8 and summary["export/onnx/top1_agreement"] >= 0.98
    assert summary["export/onnx/num_integers"] == summary["params/after"]
    for when in ("before", "after"):  # of files, in turns; what simulates integers is not timed
        assert summary[f"latency_ms/p50/onnx/{when}/b1"] > 0 and f"latency_ms/p50/{when}/b1" not in summary
    assert summary["file_bytes/onnx/after"] == (tmp_path / "model.onnx").stat().st_size
    assert summary["file_bytes/onnx/after"] < 0.35 * summary["file_bytes/onnx/before"]
    assert "env/int8_dot_products" in summary
    page = (tmp_path / "report.html").read_text()
    assert "Latency in ONNX Runtime median" in page and "File size, onnx" in page
    assert "Quantized tensors" in page and "layer3.2.conv2.weight" in page


def test_pruned_shrunk_then_quantized(ranks, tmp_path):
    more = [
        "pruning=channel", "pruning.method=l1_norm", "pruning.schedule.start=1steps", "pruning.schedule.end=2steps",
        "pruning.schedule.num_decisions=1", "quantization.start=null",
    ]  # fmt: skip
    one = ranks(1, whole_run, str(tmp_path / "1"), *more, timeout_s=110)[0]
    assert one["macs/after"] < 0.6 * one["macs/before"]
    assert one["fingerprint/scales"] and one["verify/folded_max_rel_diff"] < 1e-5
    assert one["latency_ms/p50/after/b1"] > 0  # of the small float model
    assert bits(ranks(2, whole_run, str(tmp_path / "2"), *more, timeout_s=110)[0]) == bits(one)


def test_learned_scales_have_the_same_bits_too(ranks, tmp_path):
    more = ["quantization=lsq", "optim.lr=0.01"]
    one = ranks(1, whole_run, str(tmp_path / "1"), *more, timeout_s=110)[0]
    assert bits(ranks(2, whole_run, str(tmp_path / "2"), *more, timeout_s=110)[1]) == bits(one)
    assert torch.tensor([row["scale"][0] for row in one["rows"]]).gt(0).all()


def test_weights_that_are_solved_for_have_the_same_bits_and_are_delivered(ranks, tmp_path):
    more = [
        "quantization=gptq", "quantization.config_list=[{op_types:[Conv2d,Linear]}]", "quantization.start=null",
        "quantization.freeze=1.0", "train.max_steps=1",
    ]  # fmt: skip
    exports = "export=[safetensors,onnx]"
    one, whole = ranks(1, delivered_run, str(tmp_path / "1"), *more, exports, timeout_s=110)[0]
    assert whole and one["export/safetensors/max_rel_diff"] == 0.0 and one["export/onnx/num_integers"] > 200_000
    assert len(one["rows"]) == 20
    assert bits(ranks(2, whole_run, str(tmp_path / "2"), *more, timeout_s=110)[1]) == bits(one)
