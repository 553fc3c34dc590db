"""What compression adds to the collectives of a training step, on every backend and for a model four times as deep.

    python benchmarks/collectives.py [--ranks 2] [--blocks 4] [--width 64]

All collectives are counted, whoever calls them: dist_compress, torch's DDP and FSDP2, or DeepSpeed
(`tests/traffic.py`). A step has two micro-batches a rank; it is counted with the decision and the projection at its
end. Bytes are those of the larger side of each collective: what a rank hands in, or what it gets. Prints two Markdown
tables: a step without a decision, and one with. `taylor` and `l1_norm` mask single weights and hidden units, `qat`
quantizes weights and inputs, `all` is taylor, qat and a teacher. `a -> b`: with the blocks asked for, and with four
times as many.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import RankPool  # noqa: E402
from traffic import DECIDED, PRUNED, QUANTIZED, STEADY, TAUGHT, Count, num, steps_of  # noqa: E402

FSDP = ["backend=fsdp", "backend.wrap=[Block]"]
BACKENDS = {
    "ddp, exact": ["backend=ddp", "train.exact=true"],
    "ddp": ["backend=ddp", "train.exact=false"],
    "fsdp, exact": [*FSDP, "train.exact=true"],
    "fsdp": [*FSDP, "train.exact=false"],
    **{f"deepspeed {n}": ["backend=deepspeed", f"backend.stage={n}", "train.exact=false"] for n in range(4)},
}
NONE = ["pruning=none"]
ARMS = {
    "taylor": ["pruning.method=taylor", *PRUNED],
    "l1_norm": ["pruning.method=l1_norm", *PRUNED],
    "qat": [*NONE, *QUANTIZED],
    "all": ["pruning.method=taylor", *PRUNED, *QUANTIZED, *TAUGHT],
}


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:,.1f} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:,.2f} MB"


def cell(few: Count, many: Count) -> str:
    """Collectives and bytes, of both depths."""
    counts = f"{num(few)}" if num(few) == num(many) else f"{num(few)} -> {num(many)}"
    both = size(few["bytes"]) if few["bytes"] == many["bytes"] else f"{size(few['bytes'])} -> {size(many['bytes'])}"
    return counts if not many["bytes"] else f"{counts}, {both}"


def beyond(counts: Count, plain: Count) -> Count:
    more = counts.copy()
    more.subtract(plain)  # what falls away counts, too
    return more


def main(num_ranks: int, blocks: int, width: int) -> None:
    pool: Any = RankPool()
    shape = [f"+model.width={width}", f"+model.hidden={4 * width}"]
    tables: dict[int, list[str]] = {STEADY: [], DECIDED: []}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in BACKENDS.items():
            found: dict[str, list[dict[int, Count]]] = {}
            for arm, overrides in {"none": NONE, **ARMS}.items():
                for depth in (blocks, 4 * blocks):
                    told = [*words, *overrides, *shape, f"+model.depth={depth}"]
                    ranks = pool(num_ranks, steps_of, tempfile.mkdtemp(dir=folder), *told, timeout_s=300.0)
                    assert all(other == ranks[0] for other in ranks), "the ranks differ"
                    found.setdefault(arm, []).append(ranks[0])
            for step, rows in tables.items():
                plain = [steps[step] for steps in found["none"]]
                cells = [cell(*plain)]
                cells += [cell(*(beyond(s[step], p) for s, p in zip(found[arm], plain, strict=True))) for arm in ARMS]
                rows.append(f"| {name} | {' | '.join(cells)} |")
            print(name, flush=True, file=sys.stderr)
    pool.close()
    for title, step in (("A step without a decision", STEADY), ("A step with a decision", DECIDED)):
        print(f"\n{title}:\n\n| backend | no compression | {' | '.join(f'{arm}: more' for arm in ARMS)} |")
        print(f"|{'---|' * (2 + len(ARMS))}", *tables[step], sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in (("ranks", 2), ("blocks", 4), ("width", 64)):
        parser.add_argument(f"--{key}", type=int, default=value)
    given = parser.parse_args()
    main(given.ranks, given.blocks, given.width)
