"""Every decision and the final weights of one recipe on 1, 2, 3 and 4 ranks.

    python benchmarks/exactness.py [override ...]      # default: +recipe=resnet_prune train.max_steps=60

Prints a Markdown table of fingerprints; a column is exact when all its cells are equal.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from cifar10 import run


def main(overrides: list[str]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks in (1, 2, 3, 4):
            run_dir = Path(folder) / str(num_ranks)
            summary = run(num_ranks, run_dir, *overrides, "logger=none")
            decisions = json.loads((run_dir / "facts.json").read_text())["methods"]["decisions"]
            marks = {f"masks, step {d['step']}": d["fingerprint"] for d in decisions}
            rows.append({"ranks": num_ranks, **marks, "weights": summary["fingerprint/weights"]})
    names = list(rows[0])
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in names)} |")
    differ = [name for name in names[1:] if len({row[name] for row in rows}) > 1]
    sys.exit(f"different: {', '.join(differ)}" if differ else 0)


if __name__ == "__main__":
    main(sys.argv[1:] or ["+recipe=resnet_prune", "train.max_steps=60"])
