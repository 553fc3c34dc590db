"""metrics.jsonl: one line a step, through kills and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_compress.reporting import records


def steps(path: Path) -> list[int]:
    return [row["step"] for row in records.read(path)]


def write(path: Path, numbers: range, value: float, resumed: bool = False) -> None:
    file = records.Records(path, resumed=resumed)
    for step in numbers:
        file.add(step, {"train/loss": value})
    file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_values_of_one_step_share_a_line(path: Path) -> None:
    file = records.Records(path)
    file.add(3, {"train/loss": 1.5})
    file.add(3, {"eval/accuracy": 0.5})
    file.add(4, {"train/loss": 1.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]  # before close: nothing is held back
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows] == [
        {"step": 3, "train/loss": 1.5, "eval/accuracy": 0.5},
        {"step": 4, "train/loss": 1.0},
    ]
    assert all(isinstance(row["time"], float) for row in rows)


def test_resume_drops_what_lies_beyond(path: Path) -> None:
    write(path, range(0, 10), 1.0)
    write(path, range(6, 12), 2.0, resumed=True)
    assert steps(path) == list(range(12))
    assert [row["train/loss"] for row in records.read(path)] == [1.0] * 6 + [2.0] * 6


def test_resume_may_add_to_the_step_it_goes_on_from(path: Path) -> None:
    write(path, range(0, 10), 1.0)
    file = records.Records(path, resumed=True)
    file.add(6, {"eval/accuracy": 0.5})
    file.add(7, {"train/loss": 2.0})
    file.close()
    rows = records.read(path)
    assert steps(path) == list(range(8))
    assert rows[6]["train/loss"] == 1.0 and rows[6]["eval/accuracy"] == 0.5 and rows[7]["train/loss"] == 2.0


def test_resume_that_logs_nothing_keeps_all(path: Path) -> None:
    write(path, range(0, 4), 1.0)
    write(path, range(0), 2.0, resumed=True)
    assert steps(path) == [0, 1, 2, 3]


def test_resume_without_a_file(path: Path) -> None:
    write(path, range(5, 7), 2.0, resumed=True)
    assert steps(path) == [5, 6]


def test_a_fresh_run_starts_over(path: Path) -> None:
    write(path, range(0, 4), 1.0)
    write(path, range(0, 2), 2.0)
    assert steps(path) == [0, 1]


def test_line_cut_off_by_a_kill(path: Path) -> None:
    write(path, range(0, 4), 1.0)
    path.write_bytes(path.read_bytes()[:-9])
    assert steps(path) == [0, 1, 2]
    write(path, range(3, 5), 2.0, resumed=True)
    assert steps(path) == [0, 1, 2, 3, 4]


def test_nan_is_valid_json(path: Path) -> None:
    file = records.Records(path)
    file.add(0, {"train/loss": float("nan"), "x": float("inf"), "y": 1.0})
    file.close()
    assert records.read(path)[0]["train/loss"] is None
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_events_keep_a_line_each(path: Path) -> None:
    file = records.Records(path, merge=False)
    file.add(1, {"text": "a"})
    file.add(1, {"text": "b"})
    file.close()
    resumed = records.Records(path, resumed=True, merge=False)
    for text in ("a", "c", "b"):  # told again, or new
        resumed.add(1, {"text": text})
    resumed.close()
    assert [row["text"] for row in records.read(path)] == ["a", "b", "c"]
