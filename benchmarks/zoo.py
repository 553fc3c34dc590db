"""How wide the engine is: every model captured, replayed, and shrunk by plans of 30 % and 50 %, verified.

    python benchmarks/zoo.py [--suite torchvision|timm|huggingface] [--only PATTERN] [--results FILE]
    python benchmarks/zoo.py --report            # benchmarks/zoo.md from the results

Each model has a process and a time limit of its own. Each adds one line of JSON to the results; models that have a
line are skipped, so a run goes on where it was stopped. Models have random weights and small sizes; no network.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from zoo_models.case import Case
from zoo_models.check import check
from zoo_models.report import markdown

SUITES = ("torchvision", "timm", "huggingface")
_HERE = Path(__file__).parent


def main() -> None:
    options = _options()
    if options.report:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "transformers")}
        (_HERE / "zoo.md").write_text(markdown(_read(options.results), versions))
        return
    torch.set_num_threads(1)
    known = {(row["suite"], row["name"]) for row in _read(options.results)}
    todo = []
    for suite in SUITES:
        if options.suite in (None, suite):
            for case in importlib.import_module(f"zoo_models.{suite}").cases():
                wanted = not options.only or any(fnmatchcase(case.name, pattern) for pattern in options.only)
                if wanted and (suite, case.name) not in known:
                    todo.append((suite, case))
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda item: _row(*item, options), todo):
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            removed = max((p["removed"] for p in row.get("plans", {}).values()), default=0)
            seconds = sum(row["seconds"].values())
            print(f"{row['name']:45} {removed:5.0%} {seconds:6.1f} s  "
                  f"{row.get('failure', 'counts')} {row.get('detail', '')[:200]}", flush=True)  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--only", nargs="*", help="names or patterns of models")
    parser.add_argument("--results", type=Path, default=_HERE / "zoo.jsonl")
    parser.add_argument("--report", action="store_true", help="write zoo.md from the results and stop")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--time-limit", type=int, default=300, help="CPU seconds for a model")
    parser.add_argument("--wall-limit", type=float, default=1800, help="wall seconds for a model")
    parser.add_argument("--memory-limit", type=float, default=6, help="GiB for a model")
    return parser.parse_args()


def _read(results: Path) -> list[dict]:
    """The newest row of each model."""
    lines = results.read_text().splitlines() if results.exists() else []
    return list({(row["suite"], row["name"]): row for row in map(json.loads, lines)}.values())


def _row(suite: str, case: Case, options: argparse.Namespace) -> dict:
    """The row of a model, checked in a process of its own, which ends at the limits."""
    with tempfile.NamedTemporaryFile() as file:
        # Forked, so that the libraries are imported once; no thread of torch is up yet.
        process = multiprocessing.get_context("fork").Process(target=_child, args=(case, file.name, options))
        started = time.monotonic()
        process.start()
        process.join(options.wall_limit)
        ended = process.exitcode is not None
        if not ended:
            process.kill()
            process.join()
        text = Path(file.name).read_text()
    row = json.loads(text) if text else {"seconds": {}}
    if ended and process.exitcode not in (0, -signal.SIGXCPU):
        row |= {"failure": "memory" if process.exitcode == -9 else "crash", "detail": f"exit code {process.exitcode}"}
    return {"suite": suite, "name": case.name, "family": case.family, **row,
            "wall": round(time.monotonic() - started, 1)}  # fmt: skip


def _child(case: Case, path: str, options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    bytes_ = int(options.memory_limit * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_, bytes_))
    resource.setrlimit(resource.RLIMIT_CPU, (options.time_limit, options.time_limit + 10))
    try:
        check(case, partial(_write, Path(path)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # the thread that forked is not the main one: no clean-up of the parent's threads


def _write(path: Path, row: dict) -> None:
    path.write_text(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
