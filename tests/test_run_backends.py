"""Pruning, int4 weights and a teacher in one loop of 12 steps: the same decisions and losses on every backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from whole_runs import killed_at

RUN = [
    "+recipe=smoke",
    "+model._target_=layernorm_net.Net",
    "data.image_size=8",
    "train.exact=false",  # the plain sums of each backend
    "train.channels_last=false",
    "train.max_steps=12",
    "train.global_batch_size=24",
    "train.micro_batch_size=4",
    "train.eval_batch_size=180",
    "train.log_every_steps=1",
    "optim=adamw",
    "optim.lr=0.002",
    "pruning.method=taylor",
    "pruning.sparse_ratio=0.7",
    "pruning.schedule={name: linear, start: 2steps, end: 8steps, num_decisions: 3}",  # after 2, 5 and 8 steps
    "pruning.config_list=[{op_types: [Linear], granularity: element, global_group_id: all}]",
    "quantization=qat",
    "quantization.config_list=[{op_types: [Linear], target_names: [weight], quant_dtype: int4}]",
    "quantization.start=4steps",
    "quantization.calibration_steps=1",
    "quantization.freeze=1.0",
    "distillation=self",
    "distillation.teacher.start=1steps",
    "checkpoint.every_steps=null",
    "speedup.enabled=false",  # of single weights nothing can be cut out
    "export=[]",
]
BACKENDS = {
    "ddp 2": (2, ["backend=ddp"]),
    "ddp 4": (4, ["backend=ddp"]),
    "fsdp 2": (2, ["backend=fsdp", "backend.wrap=[Block]"]),
    "fsdp 4": (4, ["backend=fsdp", "backend.min_params=500"]),
    "hsdp 4": (4, ["backend=fsdp", "backend.replicas=2"]),
    "zero-1 2": (2, ["backend=deepspeed", "backend.stage=1"]),
    "zero-1 3": (3, ["backend=deepspeed", "backend.stage=1"]),
    "zero-2 2": (2, ["backend=deepspeed", "backend.stage=2"]),
    "zero-3 2": (2, ["backend=deepspeed", "backend.stage=3"]),
    "zero-3 4": (4, ["backend=deepspeed", "backend.stage=3"]),
}


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    recipe = [] if overrides[:1] == ("+recipe=smoke",) else RUN
    run.run(compose.compose(compose.parse([*recipe, *overrides, f"run_dir={run_dir}"])))
    facts = json.loads((Path(run_dir) / "facts.json").read_text())
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((Path(run_dir) / "summary.json").read_text())
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    return {**summary, "decisions": facts["methods"]["decisions"], "losses": losses}


@pytest.fixture(scope="module")
def one_rank(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, whole_run, str(tmp_path_factory.mktemp("one")))[0]


def test_the_run_does_what_it_is_compared_for(one_rank: dict[str, Any]) -> None:
    assert [d["step"] for d in one_rank["decisions"]] == [2, 5, 8] and len(one_rank["losses"]) == 12
    assert one_rank["decisions"][-1]["ratio"] == pytest.approx(0.7, abs=1e-3)
    assert len({d["fingerprint"] for d in one_rank["decisions"]}) == 3


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "zero-1 3"])
def test_the_same_decisions_and_losses(ranks: Any, tmp_path: Path, one_rank: dict[str, Any], name: str) -> None:
    n, overrides = BACKENDS[name]
    found = ranks(n, whole_run, str(tmp_path), *overrides)[0]
    assert found["decisions"] == one_rank["decisions"]
    assert found["losses"] == pytest.approx(one_rank["losses"], rel=1e-6)
    assert found["loss/after"] == pytest.approx(one_rank["loss/after"], rel=1e-5)


def killed_run(run_dir: str, step: int, *overrides: str) -> None:
    with killed_at(step):
        whole_run(run_dir, "checkpoint.every_steps=1", *overrides)


def test_zero_resumes_what_another_backend_began(ranks: Any, tmp_path: Path, one_rank: dict[str, Any]) -> None:
    """Masked and quantized, between decisions."""
    n, overrides = BACKENDS["zero-1 3"]
    ranks(n, killed_run, str(tmp_path), 6, *overrides)
    assert not (tmp_path / "summary.json").exists()
    n, overrides = BACKENDS["ddp 2"]
    found = ranks(n, whole_run, str(tmp_path), "checkpoint.every_steps=1", *overrides)[0]
    assert found["decisions"] == one_rank["decisions"]
    assert found["losses"] == pytest.approx(one_rank["losses"], rel=1e-6)


CUT = [
    "speedup.enabled=true",
    "pruning.sparse_ratio=0.4",
    "pruning.config_list=[{op_types: [Linear], granularity: out_channel, dependency_group_id: auto}]",
    "quantization=none",
    "distillation=none",
]


def cut_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    return whole_run(run_dir, *CUT, *overrides)


@pytest.fixture(scope="module")
def cut_on_one(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, cut_run, str(tmp_path_factory.mktemp("cut")))[0]


def test_zero_shrinks_and_resumes_what_is_small(ranks: Any, tmp_path: Path, cut_on_one: dict[str, Any]) -> None:
    n, overrides = BACKENDS["zero-3 4"]
    ranks(n, killed_run, str(tmp_path), 10, *CUT, *overrides)
    n, overrides = BACKENDS["zero-2 2"]
    found = ranks(n, cut_run, str(tmp_path), "checkpoint.every_steps=1", *overrides)[0]
    for name in ("decisions", "fingerprint/plan", "macs/after"):
        assert found[name] == cut_on_one[name]
    assert found["verify/max_rel_diff"] < 1e-5
    assert found["losses"] == pytest.approx(cut_on_one["losses"], rel=1e-6)


def test_rows_that_die_of_a_quantized_net_stay_or_change_nothing(ranks: Any, tmp_path: Path) -> None:
    """A row without weights still has a bias, which reaches the next layer as a rounded input times rounded weights."""
    cut = ["speedup.enabled=true", "pruning.sparse_ratio=0.9", "distillation=none"]
    found = ranks(1, whole_run, str(tmp_path / "quantized"), *cut)[0]
    assert found["verify/quantized_max_rel_diff"] < 1e-12 and found["params/after"] < found["params/before"]
    float_run = ranks(1, whole_run, str(tmp_path / "float"), *cut, "quantization=none")[0]
    assert float_run["params/after"] < found["params/after"]  # there they are folded


GIVEN = [
    "+recipe=smoke",
    "data.image_size=8",
    "train.exact=false",
    "train.max_steps=2",
    "train.eval_batch_size=180",
    "optim.lr=0.0",  # the weights stay as they were given
    "optim.kwargs={}",
    "pruning.method=l1_norm",
    "pruning.schedule={name: one_shot, start: 0.0, end: 0.0, num_decisions: 1}",
    "pruning.config_list=[{op_types: [Conv2d], sparse_ratio: 0.5, global_group_id: all}]",
    "export=[]",
]


def given_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    return whole_run(run_dir, *GIVEN, *overrides)


def test_a_norm_decision_about_given_weights(ranks: Any, tmp_path: Path) -> None:
    """Of a net with BatchNorm: the same channels are kept on every backend."""
    right = ranks(2, given_run, str(tmp_path / "ddp"), *BACKENDS["ddp 2"][1])[0]
    assert len(right["decisions"]) == 1 and right["macs/after"] < 0.7 * right["macs/before"]
    for name in ("zero-2 2", "zero-3 2"):
        n, overrides = BACKENDS[name]
        found = ranks(n, given_run, str(tmp_path / name), *overrides)[0]
        for mark in ("decisions", "fingerprint/masks", "fingerprint/plan"):
            assert found[mark] == right[mark], name
