"""What a teacher is worth to a small language model: a Llama is cut once and trained on for the same steps, with the
dense model as its teacher and without, with several seeds.

    python benchmarks/distill_llama.py [--teacher model.safetensors] [--seeds 3] [--steps 120] [--ratio 0.6]

Without --teacher, the dense model is trained first (+recipe=llama_teacher). The cut is by magnitude, before the first
step, so that every run goes on from the same small model; seeds change the order of the data. One rank, one thread.
Prints a Markdown table: mean and standard error of the held-out perplexity.
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

ALIKE = [
    "+recipe=llama_distill", "logger=none", "export=[]", "pruning.method=l2_norm", "pruning.schedule.name=one_shot",
    "pruning.schedule.start=0", "pruning.schedule.end=0", "pruning.schedule.num_decisions=1",
]  # fmt: skip
WITHOUT = ["distillation.method=null", "distillation.weight=1.0", "distillation.task_weight=1.0"]


def run(run_dir: Path, *overrides: str) -> dict[str, float]:
    """The summary of a run on one rank."""
    command = [sys.executable, "-m", "dist_compress", *overrides, f"run_dir={run_dir}"]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((run_dir / "summary.json").read_text())


def row(name: str, values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"| {name} | {statistics.mean(values):.3f} | {error:.3f} | {', '.join(f'{v:.3f}' for v in values)} |"


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
        found: dict[str, list[dict[str, float]]] = {"labels alone": [], "labels and teacher": []}
        for seed in range(args.seeds):
            for name, more in (("labels alone", WITHOUT), ("labels and teacher", [])):
                own = [f"seed={seed}", f"train.max_steps={args.steps}", f"pruning.sparse_ratio={args.ratio}"]
                weights = [f"model.weights={teacher}", f"distillation.teacher.model.weights={teacher}"]
                where = Path(folder) / f"{seed}_{len(more)}"
                found[name].append(run(where, *ALIKE, *weights, *own, *more))
    first = found["labels alone"][0]
    print("| trained on with | perplexity | standard error | by seed |\n|---|---|---|---|")
    print(f"| (dense) | {first['perplexity/before']:.3f} | | |")
    print(f"| (cut, before the first step) | {first['perplexity/shrunk']:.3f} | | |")
    perplexities = {name: [s["perplexity/after"] for s in summaries] for name, summaries in found.items()}
    for name, values in perplexities.items():
        print(row(name, values))
    gains = [a - b for a, b in zip(*perplexities.values(), strict=True)]
    print(row("the teacher's gain", gains))
    print(f"\nMACs {first['macs/before']:,} -> {first['macs/after']:,}; {args.steps} steps")


if __name__ == "__main__":
    main()
