"""Fixtures for every test: one thread a process, and the pool of ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # workers of the pool import `ranks` by name

if TYPE_CHECKING:
    from ranks import RankPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What this machine cannot run is skipped with the reason, and listed at the end."""
    for mark, why_not in (("gpu", _why_no_gpu), ("slurm", _why_no_slurm)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := why_not()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"NOT RUN {mark}: {reason}"))


def _why_no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"


def _why_no_slurm() -> str:
    import toy_slurm

    return toy_slurm.why_not()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in skipped]
    for reason in sorted({reason for reason in reasons if reason.startswith("NOT RUN")}):
        terminalreporter.write_line(f"{reason} ({reasons.count(reason)} tests)", yellow=True)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(n, fn, *args) -> [result of rank 0, ..]`: see tests/ranks.py."""
    import ranks

    pool = ranks.RankPool()
    yield pool
    pool.close()
