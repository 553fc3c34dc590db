"""The command line around a run: one folder, one console, errors shown once, exit codes, sweeps, the wheel.

The run itself is the stand-in of tests/stand_in; bad configurations are in test_config.py, in process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dist_compress import __main__ as main
from dist_compress import run_folder
from dist_compress.errors import UserError

ROOT = Path(__file__).parents[1]


def command(*arguments: str, folder: Path, ranks: int = 0, stand_in: str = "", **environ: str):
    """The finished process of `python -m dist_compress`, or of torchrun with that many ranks, in `folder`."""
    path = [str(ROOT)] + ([str(ROOT / "tests/stand_in")] if stand_in else [])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"} | environ
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    line = [sys.executable, *torchrun, "-m", "dist_compress", *arguments]
    env["STAND_IN"] = stand_in
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def exit_codes(torchrun_said: str) -> dict[int, int]:
    """Rank -> exit code, from torchrun's report."""
    found = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", torchrun_said)
    return {int(rank): int(code) for rank, code in found}


@pytest.mark.parametrize("question", [["--help"], ["--cfg", "job"], ["--info", "defaults"]])
def test_answers_without_a_run(question, tmp_path):
    done = command(*question, "+recipe=smoke", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "max_steps: 4" in done.stdout or "recipe/smoke" in done.stdout
    assert not list(tmp_path.iterdir())


def test_all_ranks_share_a_folder_and_the_console_shows_rank_0(tmp_path):
    done = command("+recipe=smoke", folder=tmp_path, ranks=2, stand_in="good")
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2" in done.stdout and "rank 1 of 2" not in done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert set(logs) == {"rank_0.log", "rank_1.log"}
    assert all(f"rank {r} of 2" in logs[f"rank_{r}.log"] for r in (0, 1))


def test_a_fault_of_the_configuration_is_shown_once_and_stops_every_rank(tmp_path):
    done = command("train.max_stps=4", folder=tmp_path, ranks=2, stand_in="good")
    assert (done.stdout + done.stderr).count("error: train.max_stps: no such key.") == 1
    codes = exit_codes(done.stderr)
    assert codes[0] == 2 and codes[1] in (2, -15)  # SIGTERM: torchrun was faster than rank 1's imports
    assert not list(tmp_path.iterdir())


def test_a_fault_that_every_rank_meets_in_the_run_is_shown_once(tmp_path):
    done = command("run_dir=kept", folder=tmp_path, ranks=2, stand_in="user_error")
    assert (done.stdout + done.stderr).count("error: data.root='nowhere': no such folder.") == 1
    assert "UserError" not in done.stderr and exit_codes(done.stderr) == {0: 2, 1: 2}
    assert "UserError" in (tmp_path / "kept/logs/rank_1.log").read_text()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = command("run_dir=file/run", folder=tmp_path, ranks=2, stand_in="good")
    assert len(re.findall("error: run_dir=.*file/run: cannot write there", done.stderr)) == 1
    assert set(exit_codes(done.stderr).values()) == {2}


def test_our_fault_on_one_rank_is_shown_with_its_traceback(tmp_path):
    done = command("run_dir=kept", folder=tmp_path, ranks=2, stand_in="bug")
    assert done.stderr.count("KeyError: 'a fault of ours'") == 1 and "lost contact" not in done.stderr
    assert "lost contact" in (tmp_path / "kept/logs/rank_0.log").read_text()
    assert "KeyError" in (tmp_path / "kept/logs/rank_1.log").read_text()


def test_a_killed_rank_ends_the_run_and_is_named(tmp_path):
    done = command("run_dir=kept", folder=tmp_path, ranks=2, stand_in="killed")
    assert exit_codes(done.stderr) == {0: 1, 1: -9}
    assert done.stderr.count("error: rank 0 lost contact with another rank in all_reduce, called at") == 1
    assert re.search(r"sitecustomize.py:\d+: rank 1 \(process \d+\) on \S+ is gone", done.stderr), done.stderr


def test_a_sweep_runs_each_point_and_names_the_one_that_failed(tmp_path):
    arguments = ["--multirun", "+recipe=smoke", "launch.nproc_per_node=1", "run_dir=the sweep"]
    done = command(*arguments, "seed=1,2", "+optim.typo=null", folder=tmp_path, stand_in="good")
    assert done.returncode == 1 and "error: 2 of 2 points failed" in done.stderr
    assert done.stderr.count("optim.typo: no such key") == 2
    done = command(*arguments, "seed=3,4", folder=tmp_path, stand_in="good")
    assert done.returncode == 0, done.stderr
    assert "seed=3" in done.stdout and "0.9300" in done.stdout and "0.9400" in done.stdout
    assert (tmp_path / "the sweep/1/logs/rank_0.log").exists()


def test_a_sweep_inside_torchrun_is_refused_with_the_right_command(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(sys, "argv", ["dist_compress", "--multirun", "+recipe=smoke", "seed=1,2"])
    with pytest.raises(UserError) as refusal:
        main._refuse_sweep_of_ranks()
    expected = "python -m dist_compress --multirun +recipe=smoke seed=1,2 launch.nproc_per_node=3"
    assert expected in str(refusal.value)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "x"}, "outputs/slurm_7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "outputs/slurm_7_2"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "outputs/x"),
        ({"TORCHELASTIC_RUN_ID": "none"}, r"outputs/\d{8}_\d{6}"),
        ({}, r"outputs/\d{8}_\d{6}"),
    ],
)
def test_the_id_of_a_run_survives_a_requeue_or_restart(environ, folder, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert re.fullmatch(folder, run_folder.default())


def choose(folder: str) -> str:
    from dist_compress import comm

    return str(run_folder.choose(folder if comm.rank() == 0 else "elsewhere"))


def test_rank_0_decides_the_folder(ranks, tmp_path):
    assert ranks(2, choose, str(tmp_path / "run")) == [str(tmp_path / "run")] * 2


def test_the_wheel_carries_conf(tmp_path):
    source = tmp_path / "source"  # a copy: building leaves files that a later build would pick up
    for name in ("conf", "dist_compress"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for path in (ROOT / "pyproject.toml", *ROOT.glob("*.md")):
        shutil.copy(path, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--wheel-dir={tmp_path}", str(source)], check=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    done = command("--cfg", "job", "+recipe=smoke", folder=empty, PYTHONPATH=str(site))
    assert done.returncode == 0 and "max_steps: 4" in done.stdout, done.stderr
    where = [sys.executable, "-c", "import dist_compress.compose as c; print(c.CONF)"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    conf = Path(subprocess.run(where, cwd=empty, env=env, capture_output=True, text=True).stdout.strip())
    assert conf.is_relative_to(site)
    shipped = {path.relative_to(conf) for path in conf.rglob("*.yaml")}
    assert shipped == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
