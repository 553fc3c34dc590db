"""What a run tells while it goes: metrics.jsonl, the progress line, events, W&B. All of it on rank 0."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.reporting import figures, pictures, quantized, quantized_pictures, records
from dist_compress.reporting.console import ProgressLine, console, summary_table, target_table
from dist_compress.reporting.tracker import Tracker

_log = logging.getLogger(__name__)

Row = Mapping[str, Any]


class Reporter:
    """Call it alike on every rank; on all but rank 0 every method does nothing. No collectives.

    Writes `run_dir/metrics.jsonl` (one line a step) and `run_dir/events.jsonl`. A step is the number of
    optimizer steps done. With `resumed`, what was recorded beyond the first step told again is dropped. Nothing of
    an earlier run is touched before the first `log` or `event`: the run may still be refused.
    """

    def __init__(self, config: Config, run_dir: str | Path, total_steps: int, resumed: bool = False) -> None:
        self._active = comm.rank() == 0
        self._step: int | None = None if resumed else 0
        self._summary: dict[str, Any] = {}
        self._targets: list[Row] = []
        self.run_dir = Path(run_dir)
        self._config, self._resumed, self._opened = config, resumed, False
        self._progress = ProgressLine(total_steps)

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = records.Records(self.run_dir / "metrics.jsonl", resumed=self._resumed)
        self._events = records.Records(self.run_dir / "events.jsonl", resumed=self._resumed, merge=False)
        facts = {"world_size": comm.world_size()}
        self._tracker = Tracker(self._config, self.run_dir, resumed=self._resumed, facts=facts)

    def expect(self, total_steps: int) -> None:
        """How long the run will be, where that was not known at first. Before the first `log`."""
        if self._active:
            self._progress.total = total_steps

    def log(self, step: int, series: Mapping[str, float]) -> None:
        """Record series measured when `step` steps were done. Those of one step may come in several calls."""
        if not self._active or not series:
            return
        self._open()
        self._step = step
        values = {name: float(value) for name, value in series.items()}
        self._metrics.add(step, values)
        self._progress.update(step, values)
        self._tracker.log(step, values)

    def event(self, text: str, step: int | None = None) -> None:
        """Something worth a line on the console and in the report. `step`: None for the last one logged."""
        if not self._active:
            return
        self._open()
        _log.info("%s", text)
        step = self._step if step is None else step
        if step is not None:  # a resumed run knows its place from the first `log` on
            self._events.add(step, {"text": text})

    def summary(self, summary: Row, shown: Mapping[str, Sequence[Row]] | None = None) -> None:
        """The flat result of the run, shown as a table by `close` and sent to W&B under the same names.

        `shown`: `layers`, `targets`, `kept_channels`, `scores`, `quantized` and `sensitivity` as in `write_report`:
        tables and pictures of pruning and of quantization.
        """
        if self._active:
            self._open()
            self._summary, self._targets = dict(summary), list((shown or {}).get("targets", []))
            self._tracker.summary(self._summary)
            if shown:
                drawn = pictures.drawn(shown["layers"], shown["kept_channels"], shown["scores"])
                self._tracker.show("pruning", figures.tables(shown["targets"], shown["layers"]), drawn)
                both = shown["quantized"], shown["sensitivity"]
                self._tracker.show("quantization", quantized.tables(*both), quantized_pictures.drawn(*both))

    def close(self, finished: bool = True) -> None:
        """End the progress line, print the table, end the W&B run, waiting for it a bounded time.

        `finished=False` when an error ends the run: W&B then shows it as crashed.
        """
        if not self._active:
            return
        self._active = False
        self._progress.close()
        if not self._opened:
            return
        self._metrics.close()
        self._events.close()
        if self._targets:
            console().print(target_table(self._targets))
        if self._summary:
            console().print(summary_table(self._summary))
        command = self._tracker.close(finished)
        if command:
            line = Text(f"W&B recorded offline. To upload: {command}")
            console().print(line, soft_wrap=True)  # a command is copied whole


def write_summary(run_dir: str | Path, summary: Mapping[str, Any]) -> None:
    """`run_dir/summary.json`, keys sorted, replaced in one go. Rank 0 only."""
    file = Path(run_dir) / "summary.json"
    draft = file.with_suffix(".json.part")
    draft.write_text(json.dumps(dict(summary), indent=2, sort_keys=True) + "\n")
    os.replace(draft, file)
