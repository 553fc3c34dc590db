"""The reporter: silent on other ranks, the same series everywhere, progress with and without a terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.reporting import console, records
from dist_compress.reporting.console import ProgressLine
from dist_compress.reporting.reporter import Reporter, write_summary

SUMMARY = {
    "accuracy/before": 0.98,
    "accuracy/masked": 0.97,
    "accuracy/after": 0.97,
    "macs/before": 40_000_000,
    "macs/after": 16_000_000,
    "params/before": 272_474,
    "params/after": 300_000,
    "file_bytes/before": 1_100_000,
    "file_bytes/after": 550_000,
    "latency_ms/p50/before/b1": 4.0,
    "latency_ms/p50/after/b1": 2.0,
    "latency_ms/p90/before/b32": 40.0,
    "latency_ms/p90/after/b32": 25.0,
    "verify/max_rel_diff": 3.1e-7,
    "fingerprint/masks": 2**64 - 1,
    "world_size": 2,
    "backend": "ddp",
}


@pytest.fixture
def config() -> Config:
    result = Config()
    result.logger.name = "none"
    return result


def test_other_ranks_do_nothing(config: Config, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(comm, "rank", lambda: 1)
    reporter = Reporter(config, tmp_path / "run", 10)
    reporter.log(0, {"train/loss": 1.0})
    reporter.event("x")
    reporter.summary(SUMMARY)
    reporter.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_run(config: Config, tmp_path: Path, capsys) -> None:
    reporter = Reporter(config, tmp_path, 0)
    reporter.expect(4)
    reporter.event("traced")
    for step in range(1, 5):
        reporter.log(step, {"train/loss": 1 / step, "train/lr": 0.1})
        if step == 2:
            reporter.event("pruned")
    reporter.log(4, {"eval/accuracy": 0.75})
    reporter.summary(SUMMARY)
    reporter.close()
    rows = records.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["eval/accuracy"] == 0.75 and rows[3]["train/loss"] == 0.25
    events = [(e["step"], e["text"]) for e in records.read(tmp_path / "events.jsonl")]
    assert events == [(0, "traced"), (2, "pruned")]
    out = capsys.readouterr().out
    assert "step 4/4" in out and "accuracy 75.00%" in out
    assert "2.50x smaller" in out and "wandb" not in out


def test_a_resumed_run(config: Config, tmp_path: Path) -> None:
    first = Reporter(config, tmp_path, 10)
    for step in range(1, 9):
        first.log(step, {"train/loss": 1.0})
        first.event(f"event of {step}")
    first.close()
    second = Reporter(config, tmp_path, 10, resumed=True)
    second.event("a step not known yet")  # must not wipe the events of the first life
    second.event("resumed at step 5", 5)
    second.event("event of 5", 5)  # told again
    for step in range(6, 11):
        second.log(step, {"train/loss": 2.0})
        second.event(f"event of {step}")
    second.close()
    assert [r["step"] for r in records.read(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    events = [e["text"] for e in records.read(tmp_path / "events.jsonl")]
    expected = [f"event of {step}" for step in range(1, 11)]
    assert events == [*expected[:5], "resumed at step 5", *expected[5:]]


def test_summary_is_sorted_and_whole(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("old")
    write_summary(tmp_path, {"b/x": 1, "a": 2**63, "c": None})
    text = (tmp_path / "summary.json").read_text()
    assert list(json.loads(text)) == ["a", "b/x", "c"] and json.loads(text)["a"] == 2**63
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    with pytest.raises(TypeError):
        write_summary(tmp_path, {"a": object()})
    assert (tmp_path / "summary.json").read_text() == text


def test_without_a_terminal_a_line_now_and_then(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    line = ProgressLine(1000, Console(file=out, width=200))
    series = {
        "train/samples_per_s": 1280.4,
        "train/loss": 0.5,
        "train/lr": 0.01,
        "pruning/sparse_ratio": 0.25,
    }
    for step in range(0, 1000, 10):
        line.update(step, {**series, "other": 1.0})
        now[0] += 0.5  # 20 steps a second
    line.update(1000, {"train/loss": 0.125})
    line.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 6 and "\x1b" not in out.getvalue()  # every 10 s of 50, and the end
    assert lines[1].split("  ") == [
        "step 200/1000",
        "loss 0.5000",
        "lr 1.00e-02",
        "sparsity 25%",
        "1280 samples/s",
        "ETA 0:40",
    ]
    assert lines[-1].startswith("step 1000/1000  loss 0.1250") and "ETA" not in lines[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Tee:
    """Like the streams of a run: what is printed goes to the terminal and to a log file."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal, self.log = terminal, io.StringIO()

    def write(self, text: str) -> int:
        self.log.write(text)
        return self.terminal.write(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def test_the_bar_stays_out_of_the_log(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    tee = Tee(terminal)
    monkeypatch.setattr(sys, "stdout", tee)
    line = ProgressLine(10, Console())
    line.update(5, {"train/loss": 0.5})
    print("a decision")
    line.update(10, {"train/loss": 0.25})
    line.close()
    print("the end")
    assert tee.log.getvalue() == "a decision\nthe end\n"
    shown = terminal.getvalue()
    assert "a decision" in shown and "step 10/10" in shown and shown.endswith("the end\n")
    assert tee.terminal is terminal


def rendered(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_final_table() -> None:
    text = rendered(console.summary_table(SUMMARY))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows[:6] == [
        ["Accuracy", "98.00 %", "97.00 %", "-1.00 points"],
        ["Parameters", "272.47 k", "300.00 k", "1.10x larger"],
        ["MACs", "40.00 M", "16.00 M", "2.50x smaller"],
        ["File size", "1.10 MB", "550.00 kB", "2.00x smaller"],
        ["Latency median, batch 1", "4.00 ms", "2.00 ms", "2.00x faster"],
        ["Latency p90, batch 32", "40.00 ms", "25.00 ms", "1.60x faster"],
    ]
    assert "3.10e-07" in text and "f" * 16 in text and "2 (ddp)" in text and "97.00 %" in text
