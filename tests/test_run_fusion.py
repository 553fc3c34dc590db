"""Pruning, quantization with learned scales and distillation in one loop: the same bits on 1 to 4 ranks and when killed
on the way, masks before fake-quant, and scales that follow the shrink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import killed_at

QUICK = [
    "+recipe=resnet_fusion",
    "logger=none",
    "data.image_size=8",
    "train.max_steps=12",
    "train.global_batch_size=24",
    "train.micro_batch_size=4",
    "train.eval_batch_size=180",
    "optim.lr=0.01",
    "pruning.sparse_ratio=0.7",
    "pruning.schedule={name: linear, start: 2steps, end: 8steps, num_decisions: 3}",  # after 2, 5 and 8 steps
    "speedup.at=10steps",
    "quantization=lsq",  # int4, a scale for each output channel
    "quantization.calibration_steps=1",
    "quantization.start=4steps",  # between the decisions
    "quantization.freeze=1.0",
    "distillation.teacher.start=1steps",
    "checkpoint.every_steps=null",
    "export=[]",
]


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    """The summary, with the decisions, and the fingerprint of all scales at each step boundary."""
    from dist_compress import compose, outcome, run
    from dist_compress.quantization.quantizer import Quantizer

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    marks: dict[str, str] = {}
    original = Quantizer.before_step

    def noting(self: Quantizer, step: int) -> None:
        marks[str(step)] = self.fingerprint()
        check_masked(self)
        original(self, step)

    Quantizer.before_step = noting
    try:
        run.run(compose.compose(compose.parse([*QUICK, *overrides, f"run_dir={run_dir}"])))
    finally:
        Quantizer.before_step = original
    facts = json.loads((Path(run_dir) / "facts.json").read_text())
    summary = json.loads((Path(run_dir) / "summary.json").read_text())
    return {**summary, "decisions": facts["methods"]["decisions"], "marks": marks}


def check_masked(quantizer: Any) -> None:
    """A masked weight is exactly zero after fake-quant, and weights have levels of 4 bits."""
    projection, model = quantizer.context.projection, quantizer.context.model
    assert projection.projected
    for name, keep in projection.masks().items():
        weight = model.get_parameter(name)
        assert not weight.masked_select(~keep.expand(weight.shape)).any(), name
    if quantizer.begun:
        weight = model.get_parameter("linear.weight").detach()
        level = weight / quantizer.parameters["linear.weight"].scale
        assert (level - level.round()).abs().max() < 1e-3 and 0.5 < level.abs().max() < 8.01


def killed_run(run_dir: str, step: int) -> None:
    with killed_at(step):
        whole_run(run_dir, "checkpoint.every_steps=1")


def bits(summary: dict[str, Any]) -> dict[str, Any]:
    names = (
        "decisions", "fingerprint/plan", "fingerprint/weights", "fingerprint/scales", "loss/before", "loss/quantized",
        "loss/masked", "loss/shrunk", "loss/after", "verify/quantized_max_rel_diff",
    )  # fmt: skip
    return {name: summary[name] for name in names}


@pytest.fixture(scope="module")
def one_rank(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, whole_run, str(tmp_path_factory.mktemp("one")), timeout_s=110)[0]


def test_all_three_have_equal_bits_on_any_number_of_ranks(ranks: Any, tmp_path: Path, one_rank: Any) -> None:
    assert [d["step"] for d in one_rank["decisions"]] == [2, 5, 8]
    assert len(set(one_rank["marks"].values())) == 9  # learned in each of the 8 steps, from step 4 on
    assert one_rank["macs/after"] < 0.45 * one_rank["macs/before"]
    assert one_rank["verify/max_rel_diff"] <= 1e-5 and one_rank["verify/quantized_max_rel_diff"] <= 1e-12
    for n in (2, 3, 4):
        for found in ranks(n, whole_run, str(tmp_path / str(n)), timeout_s=110):
            assert bits(found) == bits(one_rank), n
            assert found["marks"] == one_rank["marks"], n


@pytest.mark.parametrize(("step", "size", "then"), [(11, 3, 1)])
def test_killed_and_resumed(ranks: Any, tmp_path: Path, one_rank: Any, step: int, size: int, then: int) -> None:
    """Small, on another number of ranks."""
    ranks(size, killed_run, str(tmp_path), step, timeout_s=110)
    assert not (tmp_path / "summary.json").exists()
    found = ranks(then, whole_run, str(tmp_path), "checkpoint.every_steps=1", timeout_s=110)[0]
    assert bits(found) == bits(one_rank)
    assert found["marks"] == {step: mark for step, mark in one_rank["marks"].items() if step in found["marks"]}


def differently(run_dir: str, how: str) -> str:
    """What becomes of a run whose quantizer does something wrong."""
    from dist_compress import comm
    from dist_compress.quantization import quantizer
    from dist_compress.quantization.methods.lsq import Lsq

    rebase, original = quantizer.Quantizer.rebase, Lsq.weight_gradient

    def reversed_scales(self: Any, transform: Any) -> None:
        rebase(self, transform)
        scale = self.parameters["layer2.1.conv2.weight"].scale
        scale.data = scale.data.flip(0)

    def own_gradient(self: Any, weight: torch.Tensor, grad: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        found = original(self, weight, grad, sums)
        self.scale.grad.mul_(1 + comm.rank())  # as if it had not been reduced
        return found

    if how == "scales not sliced alike":
        quantizer.Quantizer.rebase = reversed_scales
    else:
        Lsq.weight_gradient = own_gradient
    try:
        whole_run(run_dir, "checkpoint.every_steps=1")
    except RuntimeError as error:
        return str(error)
    finally:
        quantizer.Quantizer.rebase, Lsq.weight_gradient = rebase, original
    return ""


def test_negative_controls(ranks: Any, tmp_path: Path) -> None:
    for said in ranks(2, differently, str(tmp_path / "a"), "scales not sliced alike", timeout_s=110):
        assert "when they are quantized, with the same scales" in said
    for said in ranks(2, differently, str(tmp_path / "b"), "gradients of scales not reduced", timeout_s=110):
        assert "The ranks disagree on quantization scales at step 5" in said
