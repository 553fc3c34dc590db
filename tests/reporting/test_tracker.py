"""W&B: what it is told, and that none of its failures reaches the run."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest

from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.reporting import tracker
from dist_compress.reporting.tracker import Tracker

# A W&B that fails as FAKE says and writes down what it is told.
FAKE_WANDB = """
import json, os, sys, time
from types import SimpleNamespace
FAKE, OUT = os.environ["FAKE"], os.environ["FAKE_OUT"]
def note(**what):
    with open(OUT, "a") as file:
        file.write(json.dumps(what) + "\\n")
class Settings:
    def __init__(self, **kwargs): pass
class Run:
    step = int(os.environ.get("FAKE_STEP", "0"))
    def __init__(self): self.summary = SimpleNamespace(update=lambda s: note(summary=s))
    def log(self, values, step):
        if FAKE == "log_raises": raise ValueError("disk full")
        note(log=values, step=step)
    def finish(self, exit_code):
        note(finish=exit_code)
        if FAKE == "finish_hangs": time.sleep(60)
def login(prompt):
    assert prompt is False
    return FAKE != "no_key"
def setup():
    url = "http://127.0.0.1:1" if FAKE == "no_network" else os.environ["FAKE_URL"]
    return SimpleNamespace(settings=SimpleNamespace(base_url=url))
def init(mode, resume, settings, **kwargs):
    print("chatter on stdout")
    if FAKE == "init_raises" and mode == "online": raise RuntimeError("permission denied\\nsecond line")
    if FAKE == "init_hangs" and mode == "online": time.sleep(60)
    if FAKE == "broken": raise RuntimeError("no service")
    prefix = "offline-run-1-" if mode == "offline" else "run-1-"
    folder = os.path.join(kwargs["dir"], "wandb", prefix + kwargs["id"])
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, "run.wandb"), "w").close()
    note(init=kwargs, mode=mode)
    return Run()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fake(failure) -> function that reads what W&B was told; puts the fake W&B in front of the real one."""
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB)
    out = tmp_path / "told.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_OUT", str(out))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def use(failure: str):
        monkeypatch.setenv("FAKE", failure)
        return lambda: [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    return use


def config(mode: str | None = None) -> Config:
    result = Config()
    result.logger.mode = mode
    return result


def run(tmp_path: Path, mode: str | None, resumed: bool = False, finished: bool = True) -> str | None:
    one = Tracker(config(mode), tmp_path / "runs" / "a b", resumed=resumed, facts={"world_size": 2})
    one.log(0, {"train/loss": 1.0})
    one.log(1, {"train/loss": 0.5})
    one.summary({"accuracy/after": 0.9})
    return one.close(finished)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_offline_by_default(fake, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = fake("")
    command = run(tmp_path, None)
    init, *rest = told()
    assert init["mode"] == "offline"
    assert rest == [
        {"log": {"train/loss": 1.0}, "step": 0},
        {"log": {"train/loss": 0.5}, "step": 1},
        {"summary": {"accuracy/after": 0.9}},
        {"finish": 0},
    ]
    assert command is not None and command.startswith("wandb sync '") and "a b/wandb/offline-run-" in command
    assert not warnings(caplog)


def test_a_crashed_run_is_one(fake, tmp_path: Path) -> None:
    told = fake("")
    run(tmp_path, None, finished=False)
    assert told()[-1] == {"finish": 1}


def test_modes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert tracker.mode_of(config()) == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert tracker.mode_of(config()) == "online"
    assert tracker.mode_of(config("disabled")) == "disabled"  # the config wins
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    assert tracker.mode_of(config()) == "offline" and "sometimes" in warnings(caplog)[0]
    with pytest.raises(UserError, match="logger.mode='of'.*offline, online, disabled"):
        tracker.mode_of(config("of"))
    none = config("online")
    none.logger.name = "none"
    assert tracker.mode_of(none) == "disabled"
    none.logger.name = "tensorbord"
    with pytest.raises(UserError, match="logger.name='tensorbord'.*wandb, none"):
        tracker.mode_of(none)


def test_disabled_leaves_no_trace(fake, tmp_path: Path) -> None:
    told = fake("")
    assert run(tmp_path, "disabled") is None
    assert told() == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        ("no_key", "no API key"),
        ("no_network", "refused"),
        ("init_raises", "permission denied"),
        ("init_hangs", "no answer within 1 s"),
    ],
)
def test_online_that_fails_goes_on_offline(
    failure: str,
    text: str,
    fake,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
) -> None:
    told = fake(failure)
    monkeypatch.setenv("FAKE_URL", server)
    monkeypatch.setattr(tracker, "_START_S", 1.0)
    command = run(tmp_path, "online")
    assert [row.get("mode") for row in told()][0] == "offline"
    assert told()[-1] == {"finish": 0} and len(told()) == 5  # nothing that was queued is lost
    assert len(warnings(caplog)) == 1 and text in warnings(caplog)[0] and "offline" in warnings(caplog)[0]
    assert command is not None and "offline-run-" in command


@pytest.fixture
def server():
    """Something that answers: the address of a socket that accepts."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_online_that_works_needs_no_sync(fake, tmp_path, caplog, monkeypatch, server) -> None:
    told = fake("")
    monkeypatch.setenv("FAKE_URL", server)
    assert run(tmp_path, "online") is None
    assert told()[0]["mode"] == "online" and not warnings(caplog)


@pytest.mark.parametrize(("failure", "text"), [("log_raises", "disk full"), ("broken", "no service")])
def test_failure_is_one_warning(failure: str, text: str, fake, tmp_path, caplog) -> None:
    fake(failure)
    run(tmp_path, "offline")
    assert len(warnings(caplog)) == 1 and text in warnings(caplog)[0]


def test_finish_that_hangs_is_left_behind(fake, tmp_path, caplog, monkeypatch) -> None:
    fake("finish_hangs")
    monkeypatch.setattr(tracker, "_CLOSE_S", 0.7)
    start = time.monotonic()
    assert run(tmp_path, "offline") is not None
    assert time.monotonic() - start < 5 and "did not finish" in warnings(caplog)[0]


def test_logging_never_waits(fake, tmp_path, monkeypatch) -> None:
    """A helper that reads nothing: far more than a pipe holds is queued without a pause."""
    fake("init_hangs")
    monkeypatch.setattr(tracker, "_CLOSE_S", 0.1)
    monkeypatch.setenv("FAKE_URL", "http://127.0.0.1:1")
    one = Tracker(config("offline"), tmp_path / "run", resumed=False, facts={})
    os.kill(one._process.pid, 19)  # SIGSTOP
    start = time.monotonic()
    for step in range(5000):
        one.log(step, {"train/loss": 1.0, "x" * 100: 2.0})
    assert time.monotonic() - start < 2
    one.close()


def test_resume_continues_the_same_run(fake, tmp_path, monkeypatch) -> None:
    told = fake("")
    run(tmp_path, None)
    monkeypatch.setenv("FAKE_STEP", "1")  # W&B has step 0 already
    run(tmp_path, None, resumed=True)
    run(tmp_path, None)
    ids = [row["init"]["id"] for row in told() if "init" in row]
    assert ids[0] == ids[1] != ids[2] and ids[0].startswith("a-b-")
    second = told()[5:10]
    assert [row["step"] for row in second if "log" in row] == [1]


def test_runs_line_up() -> None:
    """Names, groups and the flat config differ where the runs differ, and only there."""
    small, large = Config(), Config()
    for one, ratio in ((small, 0.3), (large, 0.5)):
        one.pruning.method, one.pruning.sparse_ratio = "l1_norm", ratio
        one.optim.kwargs = {"momentum": 0.9}
    a, b = (tracker.start_arguments(c, Path("x"), "id", {"world_size": 2}) for c in (small, large))
    assert (a["name"], b["name"]) == (
        "resnet20-digits-l1_norm-0.3-one_shot-s0",
        "resnet20-digits-l1_norm-0.5-one_shot-s0",
    )
    assert a["group"] == b["group"] == "resnet20-digits" and a["job_type"] == "prune"
    assert {k for k in a["config"] if a["config"][k] != b["config"][k]} == {"pruning.sparse_ratio"}
    assert a["config"]["optim.kwargs.momentum"] == 0.9 and a["config"]["world_size"] == 2
    assert "l1_norm" in a["tags"] and all(len(tag) <= 64 for tag in a["tags"])


def test_the_real_one_offline(tmp_path: Path, monkeypatch, caplog) -> None:
    """The installed W&B, no network needed: a run file with our series, config and summary in it."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    command = run(tmp_path, "online")  # without a key: warns, then records offline
    assert len(warnings(caplog)) == 1 and "no API key" in warnings(caplog)[0]
    [file] = (tmp_path / "runs" / "a b" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for text in (b"train/loss", b"pruning.schedule.name", b"accuracy/after", b"resnet20-digits"):
        assert text in content
    assert command is not None and str(file.parent) in command
