"""The one output folder of a run, and what each rank says: its own log file; the console shows rank 0."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.errors import UserError

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # colours and cursor moves, which a file needs not


def enter(config: Config) -> Config:
    """Make the run's folder, start this rank's log; the config with `run_dir` absolute. Collective.

    Rank 0 decides the folder; one that exists is kept: a run resumes in its own.
    """
    path = choose(config.run_dir)
    _start_log(path)
    return dataclasses.replace(config, run_dir=str(path))


def choose(run_dir: str | None) -> Path:
    """The absolute folder, made and found writable. Collective; the same on every rank."""
    path = Path(comm.broadcast_object(str(Path(run_dir or default()).resolve())))
    comm.on_rank0(lambda: _make(path))
    return path


def default() -> str:
    """outputs/<run id>: an id that a requeued or restarted run has again, where there is one. Local."""
    environ = os.environ
    if "SLURM_ARRAY_JOB_ID" in environ:
        run_id = f"slurm_{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    elif "SLURM_JOB_ID" in environ:
        run_id = f"slurm_{environ['SLURM_JOB_ID']}"
    elif environ.get("TORCHELASTIC_RUN_ID", "none") != "none":  # "none": torchrun's for static rendezvous
        run_id = environ["TORCHELASTIC_RUN_ID"]
    else:
        run_id = time.strftime("%Y%m%d_%H%M%S")
    return f"outputs/{run_id}"


def _make(path: Path) -> None:
    probe = path / ".writable"
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"run_dir={path}: cannot write there ({error.strerror}). Choose another folder.")


def _start_log(path: Path) -> None:
    """From here on all output goes to logs/rank_N.log, that of rank 0 to the console as well. Local."""
    try:
        log = open(path / "logs" / f"rank_{comm.rank()}.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(path, error) from None
    console.log = log
    if comm.rank() == 0:
        sys.stdout, sys.stderr = Tee(sys.stdout, log), Tee(sys.stderr, log)
    else:
        console.terminal = os.dup(2)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())  # the file descriptor: also what C++ code prints
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("dist_compress").setLevel(logging.INFO)


class Tee(io.TextIOBase):
    """A terminal stream, copied to a file without escape sequences. All else is asked of the terminal."""

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        self.terminal, self.file = terminal, file

    def write(self, text: str) -> int:
        with suppress(OSError):  # a full disk must not silence the terminal
            self.file.write(_ESCAPES.sub("", text))
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()
        with suppress(OSError):
            self.file.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()

    def fileno(self) -> int:
        return self.terminal.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.terminal.encoding


class _CurrentStderr(logging.StreamHandler):
    """Writes to what sys.stderr is now: a progress bar replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream: Any = sys.stderr
        super().emit(record)


class Console:
    """The terminal itself, also of a rank whose own output goes to its log. All local."""

    def __init__(self) -> None:
        self.terminal = 2  # file descriptor
        self.log: TextIO | None = None

    def say(self, text: str) -> None:
        """Show on the terminal, and keep in the log."""
        self.note(text)
        with suppress(OSError):
            sys.stdout.flush()
        os.write(self.terminal, (text + "\n").encode())

    def note(self, text: str) -> None:
        """Keep in the log only."""
        with suppress(OSError):
            if self.log is not None:
                print(text, file=self.log, flush=True)


console = Console()
