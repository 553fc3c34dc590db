"""slurm/train.sbatch on a real SLURM of two nodes (tests/toy_slurm.py), also when the job is told to go."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy_slurm

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[toy_slurm.ToySlurm]:
    with toy_slurm.ToySlurm(tmp_path_factory.mktemp("slurm") / "toy", num_nodes=2) as cluster:
        yield cluster


def submit(cluster: toy_slurm.ToySlurm, folder: Path, *arguments: str, stand_in: str = "") -> str:
    """The id of a two-node job of slurm/train.sbatch, submitted from `folder`."""
    path = [str(ROOT)] + ([str(ROOT / "tests/stand_in")] if stand_in else [])
    environ = {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(path), "STAND_IN": stand_in}
    export = "ALL," + ",".join(f"{name}={value}" for name, value in environ.items())
    options = ["--parsable", "--nodes=2", f"--chdir={folder}", f"--export={export}"]
    return cluster.call("sbatch", *options, str(ROOT / "slurm/train.sbatch"), *arguments).strip()


def test_two_nodes_run_the_smoke_recipe(cluster, tmp_path):
    job = submit(cluster, tmp_path, "+recipe=smoke")
    state = cluster.wait(job, timeout_s=100)
    said = (tmp_path / f"slurm_{job}.log").read_text()
    assert state == "COMPLETED", said
    folder = tmp_path / f"outputs/slurm_{job}"
    assert json.loads((folder / "summary.json").read_text())["world_size"] == 2
    assert {path.name for path in (folder / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}


def test_a_job_told_to_go_is_requeued_and_resumes(cluster, tmp_path):
    quick = ["data.image_size=12", "train.max_steps=80", "checkpoint.every_steps=null"]
    job = submit(cluster, tmp_path, "+recipe=smoke", *quick)
    log, folder = tmp_path / f"slurm_{job}.log", tmp_path / f"outputs/slurm_{job}"
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 10:
        assert time.monotonic() < deadline, cluster.state(job)
        time.sleep(0.05)
    cluster.call("scancel", "--signal=USR1", "--batch", job)
    state = cluster.wait(job, timeout_s=100)
    said = log.read_text()
    assert state == "COMPLETED", said
    assert "stop and requeue job" in said and "stopped by a signal after a checkpoint" in said
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [folder.name]
    (resumed,) = [
        e for e in map(json.loads, (folder / "events.jsonl").read_text().splitlines()) if "resumed" in e["text"]
    ]
    assert resumed["step"] >= 10 and f"resumed at step {resumed['step']} from step_" in said
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 80
    assert json.loads((folder / "summary.json").read_text())["verify/max_rel_diff"] <= 1e-5


def test_a_failed_run_fails_the_job(cluster, tmp_path):
    job = submit(cluster, tmp_path, "+recipe=smoke", stand_in="user_error")
    assert cluster.wait(job, timeout_s=80) == "FAILED"
    said = (tmp_path / f"slurm_{job}.log").read_text()
    assert said.count("error: data.root='nowhere': no such folder.") == 1
