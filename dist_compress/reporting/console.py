"""The console of rank 0: the progress of a run and its final table.

On a terminal the progress is a live bar; elsewhere (a log file, SLURM, CI) a plain line every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from dist_compress.reporting import figures

_LINE_EVERY_S = 10.0


@cache
def console() -> Console:
    """What tables and lines are printed on: sys.stdout of the moment; no hard wraps outside a terminal."""
    probe = Console()
    return probe if probe.is_terminal else Console(width=110, soft_wrap=True)


def clock(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine:
    """Where the run stands: step, rate, loss, learning rate, sparsity, time left. Rank 0 only."""

    def __init__(self, total_steps: int, out: Console | None = None) -> None:
        self.total = total_steps
        self._out = out or console()
        self._shown: dict[str, float] = {}
        self._origin: tuple[int, float] | None = None  # first step seen and when: the base of the ETA
        self._printed = float("-inf")
        self._lifted: list[tuple[Any, Any]] = []  # (stream, its terminal) that now prints above the bar
        self._bar: Progress | None = None

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show what was measured when `step` steps were done. Series it does not know are not shown."""
        now = time.monotonic()
        if self._origin is None:
            self._origin = (step, now)
        self._shown |= {name: values[name] for name in _SHOWN if name in values}
        if self._out.is_terminal:
            self._bar = self._bar or self._start_bar()
            self._bar.update(self._bar.task_ids[0], completed=step, status=self._status(step, now))
        elif now - self._printed >= _LINE_EVERY_S or step >= self.total:
            self._printed = now
            self._out.print(Text(f"step {step}/{self.total}  {self._status(step, now)}"))

    def close(self) -> None:
        """Leave the last state of the bar on the screen. Safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for stream, terminal in self._lifted:
            stream.terminal = terminal
        self._lifted = []

    def _status(self, step: int, now: float) -> str:
        parts = [_SHOWN[name].format(self._shown[name]) for name in _SHOWN if name in self._shown]
        first, since = self._origin or (step, now)
        if first < step < self.total and now > since:
            parts.append(f"ETA {clock((self.total - step) * (now - since) / (step - first))}")
        return "  ".join(parts)

    def _start_bar(self) -> Progress:
        """A live bar on the terminal only.

        Streams that also feed a log file (they have a `.terminal`) keep feeding it, and what they send to the
        terminal appears above the bar; the redraws of the bar never reach the file.
        """
        streams = [s for s in (sys.stdout, sys.stderr) if hasattr(s, "terminal")]
        out = Console(file=streams[0].terminal) if streams else self._out  # type: ignore[attr-defined]
        for stream in streams:
            self._lifted.append((stream, stream.terminal))  # type: ignore[attr-defined]
            stream.terminal = FileProxy(out, stream.terminal)  # type: ignore[attr-defined]
        bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=max(6, min(24, out.width - 80))),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[status]}", table_column=Column(no_wrap=True)),
            console=out,
            redirect_stdout=not streams,
            redirect_stderr=not streams,
        )
        bar.add_task("", total=self.total, status="")
        bar.start()
        return bar


_SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/lr": "lr {:.2e}",
    "pruning/sparse_ratio": "sparsity {:.0%}",
    "eval/accuracy": "accuracy {:.2%}",
    "eval/perplexity": "perplexity {:.4g}",
    "train/samples_per_s": "{:.0f} samples/s",
}


def target_table(targets: Sequence[Mapping[str, Any]], most: int = 40) -> Table:
    """What was asked of each target, what went and why; long lists are cut, the page has all."""
    more = f"{len(targets) - most} more targets are in report.html" if len(targets) > most else None
    result = Table(title="Asked and given", title_justify="left", title_style="bold", caption=more, expand=True)
    result.add_column("target", no_wrap=True)
    result.add_column("asked", justify="right", no_wrap=True)
    result.add_column("removed", justify="right", no_wrap=True)
    result.add_column("why it differs", overflow="ellipsis", no_wrap=True, ratio=1)  # what gives way
    for row in targets[:most]:
        told = figures.target(row)
        wish = told["wish"].replace("global_group_id=", "group ")
        result.add_row(row["name"], wish, f"{told['got']}, {told['share']}", row["reason"])
    return result


def summary_table(summary: dict[str, Any]) -> Table:
    """The run in one table: before, after, change; the proof and the fingerprints below."""
    result = Table(title="Result", title_justify="left", title_style="bold")
    result.add_column("")
    for name in ("before", "after", "change"):
        result.add_column(name, justify="right")
    for figure in figures.before_after(summary):
        style = {True: "green", False: "yellow", None: ""}[figure.better]
        result.add_row(figure.label, figure.before, figure.after, Text(figure.change, style=style))
    limits = figures.limits(summary)
    if limits:
        result.add_section()
    for limit in limits:
        style = "green" if limit.held else "yellow"
        told = f"{limit.label} at most {limit.asked}"
        result.add_row(told, f"predicted {limit.predicted}", limit.reached, Text(limit.verdict, style=style))
    checks = _checks(summary)
    if checks:
        result.add_section()
    for label, value in checks:
        result.add_row(label, "", value, "")
    return result


def _checks(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What is not a before/after pair but belongs on the console."""
    found = []
    if summary.get("accuracy/masked") is not None:
        found.append(("Accuracy, masked", figures.percent(summary["accuracy/masked"])))
    if summary.get("perplexity/masked") is not None:
        found.append(("Perplexity, masked", figures.number(summary["perplexity/masked"])))
    if summary.get("verify/max_rel_diff") is not None:
        found.append(("Masked vs shrunk, max rel. diff.", f"{summary['verify/max_rel_diff']:.2e}"))
    if summary.get("verify/quantized_max_rel_diff") is not None:
        found.append(("The same, quantized", f"{summary['verify/quantized_max_rel_diff']:.2e}"))
    if summary.get("verify/folded_max_rel_diff") is not None:
        found.append(("Folded vs simulated, max rel. diff.", f"{summary['verify/folded_max_rel_diff']:.2e}"))
    for key in sorted(k for k in summary if k.startswith("export/") and k.endswith("/top1_agreement")):
        difference = f"{summary[key.replace('top1_agreement', 'max_diff')]:.2f} units"
        agree = f"{figures.percent(summary[key], 1)} agree"
        found.append((f"File of {key.split('/')[1]} vs simulated", f"{difference}, {agree}"))
    if "env/int8_dot_products" in summary:
        found.append(("int8 dot products of this CPU", summary["env/int8_dot_products"]))
    for key in sorted(k for k in summary if k.startswith("fingerprint/")):
        found.append((f"Fingerprint of the {key.partition('/')[2]}", figures.fingerprint(summary[key])))
    if "world_size" in summary:
        found.append(("Ranks", f"{summary['world_size']} ({summary.get('backend', '')})".replace(" ()", "")))
    return found
