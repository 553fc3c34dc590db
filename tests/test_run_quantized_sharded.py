"""A quantized run on sharded parameters is the run on one rank, bit for bit: pruned, shrunk, trained and delivered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from whole_runs import killed_at

QUICK = [
    "+recipe=resnet_fusion",
    "logger=none",
    "data.image_size=8",
    "train.max_steps=10",
    "train.exact=true",
    "train.channels_last=false",  # FSDP2 keeps its weights in rows, so other kernels would be used
    "train.global_batch_size=24",
    "train.micro_batch_size=4",
    "train.eval_batch_size=180",
    "optim.lr=0.01",
    "pruning.sparse_ratio=0.7",
    "pruning.schedule={name: linear, start: 2steps, end: 6steps, num_decisions: 2}",
    "speedup.at=8steps",
    "quantization=lsq",  # int4, a scale for each output channel
    "quantization.calibration_steps=1",
    "quantization.start=4steps",
    "quantization.freeze=1.0",
    "distillation.method=null",
    "checkpoint.every_steps=null",
    "export=[]",
]


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    """The summary, and the fingerprint of all scales before each step."""
    from dist_compress import compose, outcome, run
    from dist_compress.quantization.quantizer import Quantizer

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    marks: dict[int, str] = {}
    original = Quantizer.before_step

    def noting(self: Quantizer, step: int) -> None:
        marks[step] = self.fingerprint()
        original(self, step)

    Quantizer.before_step = noting  # type: ignore[method-assign]
    try:
        run.run(compose.compose(compose.parse([*QUICK, *overrides, f"run_dir={run_dir}"])))
    finally:
        Quantizer.before_step = original  # type: ignore[method-assign]
    return {**json.loads((Path(run_dir) / "summary.json").read_text()), "marks": marks}


def bits(summary: dict[str, Any]) -> dict[str, Any]:
    names = (
        "fingerprint/plan", "fingerprint/weights", "fingerprint/scales", "loss/before", "loss/quantized",
        "loss/masked", "loss/shrunk", "loss/after",
    )  # fmt: skip
    return {name: summary[name] for name in names}


FSDP = ("backend=fsdp", "backend.min_params=10000")


@pytest.fixture(scope="module")
def one_rank(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, whole_run, str(tmp_path_factory.mktemp("one")), timeout_s=110)[0]


def test_a_pruned_and_quantized_run_has_the_bits_of_one_rank(
    ranks: Any, tmp_path: Path, one_rank: dict[str, Any]
) -> None:
    assert one_rank["macs/after"] < 0.6 * one_rank["macs/before"] and len(set(one_rank["marks"].values())) == 7
    found = ranks(2, whole_run, str(tmp_path), *FSDP, timeout_s=110)[0]
    assert found["verify/quantized_max_rel_diff"] <= 1e-5 and found["verify/folded_max_rel_diff"] <= 1e-5
    assert bits(found) == bits(one_rank)
    assert found["marks"] == one_rank["marks"]


def killed_run(run_dir: str, step: int, *overrides: str) -> None:
    with killed_at(step):
        whole_run(run_dir, "checkpoint.every_steps=1", *overrides)


def test_killed_when_masked_and_resumed_on_other_ranks(ranks: Any, tmp_path: Path, one_rank: dict[str, Any]) -> None:
    ranks(3, killed_run, str(tmp_path), 5, *FSDP, timeout_s=110)
    found = ranks(2, whole_run, str(tmp_path), "checkpoint.every_steps=1", *FSDP, timeout_s=110)[0]
    assert bits(found) == bits(one_rank)
    assert found["marks"] == {step: mark for step, mark in one_rank["marks"].items() if step in found["marks"]}


def badly_cut(run_dir: str) -> str:
    """What becomes of a run whose quantizer slices scales in another order than weights."""
    from dist_compress.quantization.quantizer import Quantizer

    original = Quantizer.rebase

    def reversed_scales(self: Quantizer, transform: Any) -> None:
        original(self, transform)
        scale = self.parameters["layer2.1.conv2.weight"].scale
        scale.data = scale.data.flip(0)

    Quantizer.rebase = reversed_scales  # type: ignore[method-assign]
    try:
        whole_run(run_dir, *FSDP)
    except RuntimeError as error:
        return str(error)
    finally:
        Quantizer.rebase = original  # type: ignore[method-assign]
    return ""


def test_negative_control(ranks: Any, tmp_path: Path) -> None:
    for said in ranks(2, badly_cut, str(tmp_path), timeout_s=110):
        assert "when they are quantized, with the same scales and with float activations" in said
