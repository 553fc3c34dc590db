"""What a teacher is worth to a small language model: a Llama is cut once and trained on for the same steps, without a
teacher, with the dense model asked about every batch, and with its stored answers, with several seeds.

    python benchmarks/distill_llama.py [--teacher model.safetensors] [--seeds 3] [--steps 120] [--ratio 0.6]
        [--temperature 2.0] [--stores topk_u8:48:16 ...]

Without --teacher, the dense model is trained first (+recipe=llama_teacher). The cut is by magnitude, before the first
step, so that every run goes on from the same small model; seeds change the order of the data. A store is named by its
encoding, how many of the 259 entries of a token are the likeliest, and how many of the others are drawn. One rank, one
thread. Prints Markdown tables: mean and standard error of the held-out perplexity, and what each store adds to that of
the asked teacher, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CUT = [
    "+recipe=llama_distill", "logger=none", "export=[]", "pruning.method=l2_norm", "pruning.schedule.name=one_shot",
    "pruning.schedule.start=0", "pruning.schedule.end=0", "pruning.schedule.num_decisions=1",
]  # fmt: skip
WRITE = ["+recipe=llama_teacher", "logger=none", "export=[]", "train.max_steps=0"]
ALONE, ASKED = "labels alone", "labels and teacher, asked"


def run(run_dir: Path, *overrides: str) -> dict[str, float]:
    """The summary of a run on one rank."""
    command = [sys.executable, "-m", "dist_compress", *overrides, f"run_dir={run_dir}"]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((run_dir / "summary.json").read_text())


def row(name: str, values: list[float], digits: int = 3) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    each = ", ".join(f"{v:.{digits}f}" for v in values)
    return f"| {name} | {statistics.mean(values):.{digits}f} | {error:.{digits}f} | {each} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--stores", nargs="*", default=["topk_u8:48:16"], help="encoding:k:draws")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher = args.teacher
        if teacher is None:
            run(Path(folder) / "teacher", "+recipe=llama_teacher", "logger=none")
            teacher = f"{folder}/teacher/model.safetensors"
        arms = {
            ALONE: ["distillation.method=null"],
            ASKED: [f"distillation.teacher.model.weights={teacher}"],
        }
        written = {}
        for number, name in enumerate(args.stores):
            store, (encoding, k, draws) = f"{folder}/store_{number}", name.split(":")
            keys = [f"write={store}", f"encoding={encoding}", f"k={k}", f"draws={draws}"]
            keys = [f"distillation.store.{key}" for key in (*keys, f"temperatures=[{args.temperature}]")]
            written[name] = run(Path(folder) / f"write_{number}", *WRITE, f"model.weights={teacher}", *keys)
            arms[name] = ["distillation.teacher.mode=store", f"distillation.teacher.store={store}"]
        alike = [*CUT, f"model.weights={teacher}", f"train.max_steps={args.steps}"]
        alike += [f"distillation.temperature={args.temperature}"]
        alike += [f"pruning.sparse_ratio={args.ratio}"]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for seed in range(args.seeds):
            for number, (name, more) in enumerate(arms.items()):
                where = Path(folder) / f"{seed}_{number}"
                found[name].append(run(where, *alike, f"seed={seed}", *more))
    first = found[ALONE][0]
    print("| trained on with | perplexity | standard error | by seed |\n|---|---|---|---|")
    print(f"| (dense) | {first['perplexity/before']:.3f} | | |")
    print(f"| (cut, before the first step) | {first['perplexity/shrunk']:.3f} | | |")
    ends = {name: [s["perplexity/after"] for s in summaries] for name, summaries in found.items()}
    for name in (ALONE, ASKED):
        print(row(name, ends[name]))
    print(row("the teacher's gain", [a - b for a, b in zip(ends[ALONE], ends[ASKED], strict=True)]))
    print(f"\nMACs {first['macs/before']:,} -> {first['macs/after']:,}; {args.steps} steps\n")
    columns = ("stored", "perplexity", "more than asked", "standard error", "by seed", "bytes a token")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, told in written.items():
        size = told["teacher_store/bytes"] / told["teacher_store/samples"] / 128
        more = row(name, [a - b for a, b in zip(ends[name], ends[ASKED], strict=True)], digits=4)
        start, _, rest = more.removeprefix("| ").partition(" | ")
        print(f"| {start} | {statistics.mean(ends[name]):.3f} | {rest} {size:.0f} |")


if __name__ == "__main__":
    main()
