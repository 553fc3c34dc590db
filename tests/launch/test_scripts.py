"""The scripts of launch/, with a Python that only says what it was asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_compress import compose

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  *"-m venv"*) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" && cp "$0" "${!#}/bin/torchrun" ;;
  *"-m pip install"*) [ -z "${PIP_FAILS:-}" ] ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of launch/ beside a pyproject.toml, without .venv."""
    shutil.copytree(ROOT / "launch", tmp_path / "project/launch")
    (tmp_path / "project/pyproject.toml").write_text("one")
    (tmp_path / "python3").write_text(FAKE_PYTHON)
    (tmp_path / "python3").chmod(0o755)
    return tmp_path / "project"


def launch(project: Path, script: str, *arguments: str, code: int = 0, **environ: str) -> list[str]:
    """What the Pythons were asked to do, in order."""
    calls = project.parent / "calls"
    calls.unlink(missing_ok=True)
    env = {**os.environ, "PYTHON": str(project.parent / "python3"), "CALLS": str(calls)} | environ
    done = subprocess.run([project / "launch" / script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return calls.read_text().splitlines() if calls.exists() else []


def test_run_sets_up_once_and_starts_torchrun(project):
    venv, pip, torchrun = launch(project, "run", "+recipe=smoke", "seed=1", CUDA_VISIBLE_DEVICES="")
    assert venv == f"python3 -m venv --clear {project}/.venv"
    assert pip.startswith("python -m pip install") and pip.endswith(f"--editable {project}")
    assert torchrun == "torchrun --standalone --nproc-per-node=2 -m dist_compress +recipe=smoke seed=1"
    assert launch(project, "run", "+recipe=smoke", "seed=1", CUDA_VISIBLE_DEVICES="") == [torchrun]


def test_an_interrupted_set_up_is_taken_up_again(project):
    launch(project, "run", code=1, PIP_FAILS="yes")
    calls = launch(project, "run")
    assert [call.split()[0] for call in calls] == ["python", "python", "torchrun"]  # no second venv
    (project / ".venv/bin/python").unlink()
    (project / ".venv/installed-base").unlink()
    assert "venv --clear" in launch(project, "run")[0]


def test_a_changed_pyproject_and_another_extra_are_installed(project):
    launch(project, "run")
    (project / "pyproject.toml").write_text("two")
    assert any("pip install" in call for call in launch(project, "run"))
    assert any(call.endswith(f"{project}[models]") for call in launch(project, "run", "model=timm"))


def test_backends_bring_their_extra(project):
    call = next(c for c in launch(project, "run", "backend=deepspeed", "backend.stage=2") if "pip install" in c)
    assert call.endswith(f"{project}[deepspeed]")


RECIPES = sorted(path.stem for path in (ROOT / "conf/recipe").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_needs_is_installed(project, recipe):
    config = compose.compose(compose.parse([f"+recipe={recipe}", "run_dir=unused"]))
    wanted = {"models": config.model.source in ("hf", "timm"), "onnx": "onnx" in config.export}
    needed = [extra for extra, asked in wanted.items() if asked]
    pip = next(call for call in launch(project, "run", f"+recipe={recipe}") if "pip install" in call)
    assert pip.endswith(f"{project}[{','.join(needed)}]" if needed else f"{project}")


def test_ranks_are_the_visible_gpus_or_what_is_asked_for(project):
    assert "--nproc-per-node=3" in launch(project, "run", CUDA_VISIBLE_DEVICES="0,2,5")[-1]
    assert "--nproc-per-node=4" in launch(project, "run", NPROC_PER_NODE="4")[-1]


def test_sweep_is_one_plain_python(project):
    call = launch(project, "sweep", "+recipe=smoke", "seed=1,2", NPROC_PER_NODE="2")[-1]
    assert call == "python -m dist_compress --multirun launch.nproc_per_node=2 +recipe=smoke seed=1,2"


def test_multinode_sets_up_and_leaves_the_rest_to_a_module(project):
    script = (project / "launch/multinode").read_text()
    assert "NPROC_PER_NODE=$num_ranks exec" in script
    assert launch(project, "multinode", "+recipe=smoke")[-1] == "python -m dist_compress.node +recipe=smoke"


def test_test_installs_the_test_extra(project):
    calls = launch(project, "test", "-k", "select")
    assert calls[1].endswith(f"{project}[test]") and calls[2] == "python -m pytest -k select"
