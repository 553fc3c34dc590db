"""Several machines, which are two torchruns on the loopback interface here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dist_compress import node
from dist_compress.errors import UserError

ROOT = Path(__file__).parents[2]


def start(folder: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    """One of two machines, with one rank."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NNODES": "2", "NPROC_PER_NODE": "1"}
    line = [sys.executable, "-m", "dist_compress.node", *arguments]
    env |= {"MASTER_ADDR": "127.0.0.1", **environ}
    return subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.slow
def test_two_machines_run_the_smoke_recipe(tmp_path):
    port = free_port()
    machines = [start(tmp_path, "+recipe=smoke", "run_dir=run", MASTER_PORT=port) for _ in range(2)]
    try:
        said = [machine.communicate(timeout=100)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2
    assert {path.name for path in (tmp_path / "run/logs").iterdir()} == {"rank_0.log", "rank_1.log"}


def test_a_machine_that_never_comes_ends_the_others_with_what_to_check(tmp_path):
    port = free_port()
    machine = start(tmp_path, "+recipe=smoke", MASTER_PORT=port, JOIN_TIMEOUT_S="2")
    try:
        said = machine.communicate(timeout=60)[0]
    finally:
        machine.kill()
    assert machine.returncode == 2 and said.count("error:") == 1, said
    assert "error: The 2 machines of NNODES did not come together in 2 s" in said and "raise JOIN_TIMEOUT_S" in said
    assert "MASTER_ADDR=127.0.0.1 is the address of one of them" in said and f"port {port}" in said


GOOD = {"NNODES": "2", "MASTER_ADDR": "10.0.0.1"}


def test_the_environment_becomes_a_rendezvous():
    assert node.torchrun_options(GOOD | {"RUN_ID": "7", "NPROC_PER_NODE": "8", "JOIN_TIMEOUT_S": "60"}) == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.0.0.1:29400",
        "--rdzv-id=7",
        "--rdzv-conf=join_timeout=60,read_timeout=60",
    ]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "NNODES and MASTER_ADDR: not set. Give the number of machines"),
        ({"NNODES": "2"}, "MASTER_ADDR: not set. Give the number of machines"),
        (GOOD | {"NNODES": "two"}, "NNODES=two: a whole number of at least 1 is needed. For example: NNODES=2"),
        (GOOD | {"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: a whole number"),
        (GOOD | {"MASTER_ADDR": "10.0.0.1:29400"}, "an address without a port, which is MASTER_PORT"),
        (GOOD | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: a port is at most 65535"),
        (GOOD | {"JOIN_TIMEOUT_S": "5m"}, "JOIN_TIMEOUT_S=5m: a whole number"),
        (GOOD | {"WORLD_SIZE": "2"}, "this is a rank of another torchrun"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_told(environ, said):
    with pytest.raises(UserError) as refusal:
        node.torchrun_options(environ)
    assert said in str(refusal.value)
