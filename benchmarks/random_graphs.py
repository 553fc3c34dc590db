"""The laws of speedup on random small models: masked equals shrunk, and what could go is gone.

    python benchmarks/random_graphs.py [--count 10000] [--first 0]

Models first, first + 1, .. follow from their numbers alone, so that a run can be cut into ranges and a failure replayed
(`cd tests; python -c "import random_nets; print(random_nets.describe(N)); random_nets.check(N)"`). Prints every failure
and a Markdown table by the way the models were masked; a run in which little was removed would prove little.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from random_nets import Broken, Outcome, check  # noqa: E402


def main(first: int, count: int) -> int:
    """The number of failures."""
    warnings.simplefilter("ignore")
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    failed, start = 0, time.process_time()
    for seed in range(first, first + count):
        try:
            outcome = check(seed)
        except Broken as error:
            failed += 1
            print(error, flush=True)
        else:
            outcomes[outcome.style].append(outcome)
        if (seed + 1 - first) % 1000 == 0:
            print(f"{seed + 1 - first} models, {failed} failed", file=sys.stderr, flush=True)
    print("| masked | models | shrunk | parameters left, mean | largest error, float64 |\n|---|---|---|---|---|")
    for style, found in sorted(outcomes.items()):
        shrunk = sum(o.after < o.before for o in found) / len(found)
        left = sum(o.after / o.before for o in found) / len(found)
        print(f"| {style} | {len(found)} | {shrunk:.0%} | {left:.0%} | {max(o.error for o in found):.1e} |")
    print(f"\n{count} models, {failed} failed, {time.process_time() - start:.0f} CPU seconds")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10000)
    args = parser.parse_args()
    sys.exit(bool(main(args.first, args.count)))
