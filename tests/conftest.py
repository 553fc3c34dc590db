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


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(n, fn, *args) -> [result of rank 0, ..]`: see tests/ranks.py."""
    import ranks

    pool = ranks.RankPool()
    yield pool
    pool.close()
