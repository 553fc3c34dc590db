"""`--multirun`: Hydra's sweeper chooses the points, each is a torchrun of its own, one table at the end.

It runs in one plain process, so that any sweeper and launcher works (in a row by default, as SLURM jobs with
hydra-submitit-launcher). A point is a folder SWEEP/N with `point.json` and all that a run leaves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from rich.console import Console
from rich.table import Table

from dist_compress import compose, config
from dist_compress.errors import UserError

# columns: heading, key of summary.json, format
_COLUMNS = (
    ("accuracy before", "accuracy/before", "{:.4f}"),
    ("after", "accuracy/after", "{:.4f}"),
    ("perplexity before", "perplexity/before", "{:.4g}"),
    ("after", "perplexity/after", "{:.4g}"),
    ("MACs before", "macs/before", "{:,}"),
    ("after", "macs/after", "{:,}"),
    ("parameters before", "params/before", "{:,}"),
    ("after", "params/after", "{:,}"),
    ("ms before", "latency_ms/p50/before/b1", "{:.2f}"),
    ("after", "latency_ms/p50/after/b1", "{:.2f}"),
)


def sweep(args: argparse.Namespace) -> int:
    """Run every point, show the table. Returns the exit code: 0 when no point failed."""
    folder = f"outputs/sweep_{time.strftime('%Y%m%d_%H%M%S')}"
    overrides = []
    for override in args.overrides:
        key, _, value = override.partition("=")
        if key in ("run_dir", "hydra.sweep.dir"):
            folder = value.strip("'\"")
        else:
            overrides.append(override)
    path = Path(folder).resolve()
    for stale in path.glob("*/point.json"):  # of an earlier sweep here; its results stay
        stale.unlink()
    flags = _flags(args.config_name, [args.config_dir] if args.config_dir else [])
    sys.argv[1:] = ["--multirun", *flags, *overrides, f"hydra.sweep.dir={_quoted(path)}"]
    try:
        compose.hand_to_hydra(run_point)
        code = 0
    except SystemExit as stop:  # Hydra has said why; show what there is
        code = int(stop.code or 0)
    points = [json.loads(p.read_text()) for p in path.glob("*/point.json")]
    points.sort(key=lambda point: point["number"])
    return max(code, _conclude(path, points)) if points else code or 1


def run_point(composed: Any) -> None:
    """One point, as its own torchrun; what became of it is in point.json. Called by Hydra's launcher."""
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    overrides = list(job.overrides.task)
    point: dict[str, Any] = {"number": job.job.num, "overrides": overrides, "exit_code": None}
    told = folder / "point.json"
    told.write_text(json.dumps(point))
    print(f"\npoint {point['number']}: {' '.join(overrides)}", flush=True)
    try:
        num_ranks = config.load(composed).launch.nproc_per_node
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        point["exit_code"] = 2
    else:
        users = [s.path for s in job.runtime.config_sources if s.provider == "command-line"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={num_ranks}", "-m", "dist_compress"]
        command += [*_flags(job.job.config_name, users), *overrides, f"run_dir={_quoted(folder)}"]
        point["exit_code"] = subprocess.run(command).returncode
    told.write_text(json.dumps(point))


def _flags(config_name: str | None, config_dirs: list[str]) -> list[str]:
    names = [f"--config-name={config_name}"] if config_name else []
    return names + [f"--config-dir={folder}" for folder in config_dirs]


def _quoted(path: Path) -> str:
    """A path as a string of Hydra's override grammar, whatever characters it has."""
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


def _conclude(folder: Path, points: list[dict[str, Any]]) -> int:
    """Print the table of all points. Returns 1 when one failed, naming it."""
    common = set.intersection(*(set(point["overrides"]) for point in points)) if len(points) > 1 else set()
    table = Table(title=str(folder), caption="accuracy on the held-out split; ms: median, batch 1")
    files = [folder / str(point["number"]) / "summary.json" for point in points]
    summaries = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    columns = [c for c in _COLUMNS if not c[1].startswith("perplexity/") or any(c[1] in s for s in summaries)]
    for heading in ("point", "overrides", *(column[0] for column in columns)):
        table.add_column(heading, overflow="fold")
    failed = []
    for point, summary in zip(points, summaries, strict=True):
        name = " ".join(o for o in point["overrides"] if o not in common)
        values = [form.format(summary[key]) if key in summary else "-" for _, key, form in columns]
        table.add_row(str(point["number"]), name, *values)
        if point["exit_code"] != 0:
            failed.append(f"  {point['number']} ({name}): exit code {point['exit_code']}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if failed:
        print(f"error: {len(failed)} of {len(points)} points failed:", *failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0
