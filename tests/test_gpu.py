"""Whole runs on GPUs, as users start them: kernels of CUDA, bfloat16, compiled, and NCCL where there are two.

With one rank there is no process group (`comm.init`), whatever the backend: fsdp and deepspeed then are data parallel
of one process, and no collective runs. What is sharded, and NCCL, is covered by the tests on two GPUs alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]
SHORT = [
    "logger=none",
    "data.image_size=8",
    "train.max_steps=8",
    "train.global_batch_size=32",
    "train.micro_batch_size=8",
    "train.log_every_steps=1",
    "train.exact=false",
    "pruning.schedule={name: linear, start: 2steps, end: 4steps, num_decisions: 2}",
    "checkpoint.every_steps=null",
    "export=[safetensors]",
]
FAST = ["train.precision=bf16", "train.compile=true"]
BACKENDS = {"ddp": ["backend=ddp"], "fsdp": ["backend=fsdp", "backend.min_params=10000"],
            "deepspeed": ["backend=deepspeed", "backend.stage=2"]}  # fmt: skip


def whole_run(num_ranks: int, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """The summary of a run, and its losses."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [*ranks, "-m", "dist_compress", *SHORT, *overrides, f"run_dir={run_dir}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    return {**json.loads((run_dir / "summary.json").read_text()), "losses": losses}


def check(found: dict[str, Any], num_ranks: int) -> None:
    assert len(found["losses"]) == 8 and all(0 < loss < 10 for loss in found["losses"])
    assert found["world_size"] == num_ranks and found["verify/max_rel_diff"] <= 1e-2
    assert found["macs/after"] < 0.7 * found["macs/before"]


@pytest.mark.parametrize("recipe", ["resnet_prune", "resnet_fusion"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recipe_in_bfloat16_and_compiled(tmp_path, recipe, backend):
    check(whole_run(1, tmp_path, f"+recipe={recipe}", "speedup.tolerance=0.01", *FAST, *BACKENDS[backend]), 1)


@pytest.mark.parametrize("recipe", ["resnet_prune", "resnet_fusion"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recipe_in_bfloat16_and_compiled_over_nccl(tmp_path, recipe, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("NOT RUN gpu: needs two CUDA devices")
    check(whole_run(2, tmp_path, f"+recipe={recipe}", "speedup.tolerance=0.01", *FAST, *BACKENDS[backend]), 2)


def test_compiled_and_recomputed_runs_learn_what_plain_ones_do(tmp_path):
    """In float32, with the rounding of other kernels: the first step, before anything is decided by it."""
    plain = whole_run(1, tmp_path / "plain", "+recipe=resnet_prune")
    for name, overrides in {"compiled": FAST[1:], "again": ["train.activation_checkpointing=[Block]"]}.items():
        found = whole_run(1, tmp_path / name, "+recipe=resnet_prune", *overrides)
        assert found["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-5), name
