"""W&B at arm's length: a helper process does the talking, this side only queues; see `wandb_process.py`.

Whatever happens over there (no key, no network, a hang, a crash) is one warning here; `close` waits a bounded
time.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.reporting import figures
from dist_compress.reporting.drawing import Drawing

_log = logging.getLogger(__name__)

_MODES = ("offline", "online", "disabled")
_START_S = 20.0  # to log in and go online, before the helper records offline
_UPLOAD_S = 20.0  # for what is left to upload at the end
_CLOSE_S = 45.0  # how long the end of a run waits for the helper before it leaves
_CRASH_S = 8.0  # the same when an error ends the run: its message must not be late


def mode_of(config: Config) -> str:
    """online, offline or disabled: `logger.mode` wins over WANDB_MODE, which wins over offline. Local."""
    if config.logger.name not in ("wandb", "none"):
        raise UserError(f"logger.name={config.logger.name!r}: no such logger. Available: wandb, none.")
    if config.logger.name == "none":
        return "disabled"
    if config.logger.mode is not None:
        if config.logger.mode not in _MODES:
            raise UserError(f"logger.mode={config.logger.mode!r}: must be one of {', '.join(_MODES)}.")
        return config.logger.mode
    asked = os.environ.get("WANDB_MODE") or "offline"
    if asked not in _MODES:
        _log.warning("WANDB_MODE=%r is none of %s: recording offline.", asked, ", ".join(_MODES))
        return "offline"
    return asked


def start_arguments(config: Config, run_dir: Path, run_id: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `wandb.init`, chosen so that runs line up in W&B's run comparer.

    The config is flat and complete, the name says what differs and the group what is shared; `facts` (world
    size and such) stand in the config too, since they are no choice of the recipe.
    """
    pruning = config.pruning
    model, data = figures.source_name(asdict(config.model)), figures.source_name(asdict(config.data))
    name = [model, data]
    if pruning.method:
        ratio = [] if pruning.sparse_ratio is None else [f"{pruning.sparse_ratio:g}"]
        name += [pruning.method.rpartition(".")[2], *ratio, pruning.schedule.name]
    return {
        "project": config.logger.project,
        "dir": str(run_dir),
        "id": run_id,
        "name": "-".join([*name, f"s{config.seed}"])[:128],
        "group": config.logger.group or f"{model}-{data}",
        "job_type": "prune" if pruning.method else "train",
        "tags": [tag[:64] for tag in dict.fromkeys([*config.logger.tags, config.backend.name, *name])],
        "config": {**flat(asdict(config)), **facts},
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 1}} -> {"train.epochs": 1}. Lists stay whole: positions compare nothing."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _run_id(folder: Path, resumed: bool) -> str:
    """The same id for every life of a run; a new run in an old folder gets a new one."""
    file = folder / "run_id"
    if resumed and file.exists():
        return file.read_text().strip()
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().parent.name)[:40].strip("-")
    run_id = "-".join(filter(None, [name, secrets.token_hex(4)]))
    file.write_text(run_id + "\n")
    return run_id


class Tracker:
    """One W&B run. Rank 0 only. Nothing here waits for W&B but `close`, and that at most `_CLOSE_S`."""

    def __init__(self, config: Config, run_dir: Path, *, resumed: bool, facts: dict[str, Any]) -> None:
        self._mode = mode_of(config)
        self._process: subprocess.Popen[bytes] | None = None
        if self._mode == "disabled":
            return
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        start = folder / "start.json"
        self._id = _run_id(folder, resumed)
        arguments = start_arguments(config, run_dir, self._id, facts)
        order = {"init": arguments, "start_s": _START_S, "upload_s": _UPLOAD_S}
        start.write_text(json.dumps(order, default=str))
        self._folder = folder
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        with (folder / "helper.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("wandb_process.py")), str(start), self._mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "WANDB_MODE": self._mode},  # decided here; what W&B cannot read would stop it
                start_new_session=True,  # Ctrl-C is for the run; the end of the pipe is for the helper
            )
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._listen)]
        for thread in self._threads:
            thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Queue series of a step. Never waits, never raises."""
        if self._process is not None:
            self._queue.put({"log": values, "step": step})

    def summary(self, summary: dict[str, Any]) -> None:
        """Queue the flat summary under the names of summary.json. Never waits, never raises."""
        if self._process is not None:
            self._queue.put({"summary": summary})

    def show(self, section: str, tables: Mapping[str, figures.Table], drawings: Mapping[str, Drawing]) -> None:
        """Queue tables and pictures of the result, one panel each, in a section. Never waits, never raises."""
        if self._process is None:
            return
        images = {}
        for name, drawing in drawings.items():
            file = self._folder / f"{name.replace(' ', '_')}.png"
            file.write_bytes(drawing.png())
            images[f"{section}/{name}"] = str(file)
        self._queue.put({"tables": {f"{section}/{name}": table for name, table in tables.items()}, "images": images})

    def close(self, finished: bool = True) -> str | None:
        """End the W&B run, as crashed unless `finished`. Returns the command that uploads it, if needed."""
        if self._process is None:
            return None
        if finished:
            self._queue.put({"finish": True})
        self._queue.put(None)
        try:
            self._process.wait(_CLOSE_S if finished else _CRASH_S)
        except subprocess.TimeoutExpired as late:
            _log.warning("W&B did not finish within %.0f s; its files so far are kept.", late.timeout)
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._threads[1].join(1.0)
        uploaded = self._mode == "online" and self._process.returncode == 0
        self._process = None
        return None if uploaded else self._sync_command()

    def _sync_command(self) -> str | None:
        """A folder for each life of the run; they share the id, and W&B joins them in order."""
        folders = sorted(str(p) for p in self._folder.glob(f"*run-*-{self._id}") if any(p.glob("*.wandb")))
        return f"wandb sync {shlex.join(folders)}" if folders else None

    def _send(self) -> None:
        process = self._process
        assert process is not None and process.stdin is not None
        while (message := self._queue.get()) is not None:
            try:
                process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
                process.stdin.flush()
            except OSError:  # the helper has gone, and has said why
                return
        process.stdin.close()

    def _listen(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "warning" in message:
                _log.warning("%s", message["warning"])
                self._mode = "offline"
