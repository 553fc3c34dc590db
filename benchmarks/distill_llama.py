"""What a teacher is worth to a small language model: a Llama is cut once and trained on for the same steps, without a
teacher, with the dense model asked about every batch, and with its stored answers, with several seeds.

    python benchmarks/distill_llama.py [--teacher model.safetensors] [--seeds 3] [--steps 120] [--ratio 0.6]

Without --teacher, the dense model is trained first (+recipe=llama_teacher). The cut is by magnitude, before the first
step, so that every run goes on from the same small model; seeds change the order of the data. The store holds the 64
likeliest of 259 entries of each token. One rank, one thread. Prints a Markdown table: mean and standard error of the
held-out perplexity.
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
WRITE = [
    "+recipe=llama_teacher", "logger=none", "export=[]", "train.max_steps=0", "distillation.store.encoding=topk_u8",
    "distillation.store.temperatures=[2.0]",
]  # fmt: skip
ALONE, ASKED, STORED = "labels alone", "labels and teacher, asked", "labels and teacher, stored"


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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher = args.teacher
        if teacher is None:
            run(Path(folder) / "teacher", "+recipe=llama_teacher", "logger=none")
            teacher = f"{folder}/teacher/model.safetensors"
        store = f"{folder}/store"
        told = run(Path(folder) / "write", *WRITE, f"model.weights={teacher}", f"distillation.store.write={store}")
        arms = {
            ALONE: ["distillation.method=null"],
            ASKED: [f"distillation.teacher.model.weights={teacher}"],
            STORED: ["distillation.teacher.mode=store", f"distillation.teacher.store={store}"],
        }
        alike = [*CUT, f"model.weights={teacher}", f"train.max_steps={args.steps}"]
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
    for name, values in ends.items():
        print(row(name, values))
    print(row("the teacher's gain", [a - b for a, b in zip(ends[ALONE], ends[ASKED], strict=True)]))
    print(row("stored - asked", [a - b for a, b in zip(ends[STORED], ends[ASKED], strict=True)], digits=4))
    print(
        f"\nMACs {first['macs/before']:,} -> {first['macs/after']:,}; {args.steps} steps; the store: "
        f"{told['teacher_store/bytes']:,} bytes for {told['teacher_store/samples']:,} samples of 128 tokens"
    )


if __name__ == "__main__":
    main()
