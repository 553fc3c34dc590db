"""Append-only JSON lines of a run, one object a line, each with `step` and `time`.

The file survives a kill (a line is handed to the system when it is written) and a resume: what the earlier
life of the run recorded beyond the step where the new one goes on is cut off. So each step is there once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _scan(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, where it ends in bytes) up to the first line that a kill has cut off."""
    end = 0
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield json.loads(line), end


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, in order; [] when there is none. Local."""
    return [row for row, _ in _scan(path)]


class Records:
    """One file of rows, steps ascending. Rank 0 only: the caller keeps the other ranks out.

    `merge`: values added at the step of the last row join that row, so that a step is one line. Without it a
    step may have several rows, but never the same one twice.
    """

    def __init__(self, path: Path, *, resumed: bool = False, merge: bool = True) -> None:
        self._path = path
        self._merge = merge
        self._same: list[dict[str, Any]] = []  # the rows of the last step
        self._start = 0  # where the last row begins, in bytes
        self._unchecked = resumed  # the earlier life's rows: the first new step tells which of them hold
        self._file = path.open("rb+" if resumed and path.exists() else "wb")

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Record values at a step. Numbers that JSON cannot hold (nan, inf) become null."""
        if self._unchecked:
            self._cut(step)
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self._same and self._same[-1]["step"] != step:
            self._same = []
        if self._same and self._merge:
            row = {**self._same.pop(), **values}
        elif any(values.items() <= row.items() for row in self._same):
            return
        else:
            row = {"step": step, "time": round(time.time(), 3), **values}
            self._start = self._file.seek(0, 2)
        self._same.append(row)
        self._file.seek(self._start)
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.truncate()
        self._file.flush()

    def close(self) -> None:
        """Close the file; adding afterwards is an error."""
        self._file.close()

    def _cut(self, step: int) -> None:
        """Keep what the earlier life recorded up to `step`, which may go on gaining values."""
        self._unchecked = False
        end = 0
        for row, row_end in _scan(self._path):
            if row["step"] > step:
                break
            if self._same and self._same[-1]["step"] != row["step"]:
                self._same = []
            self._same.append(row)
            self._start, end = end, row_end
        self._file.truncate(end)
