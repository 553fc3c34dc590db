"""Half of the MACs of resnet20 cut on CIFAR-10, with and without a teacher, for the same epochs, over seeds.

    python benchmarks/distill_cifar.py IMAGES RESNET20.safetensors RESNET56.safetensors [--epochs 1] [--seeds 3]
        [--lr 0.05] [--teacher-lr 0.01]

IMAGES/{train,test}/<class>/*.png; weights of the option-A CIFAR nets. Both runs of a seed are `+recipe=cifar_prune`,
one with `distillation=logits`, whose teacher is resnet56. Softened logits have larger gradients than labels that a
trained net knows by heart, so each has the learning rate that suits it, of 0.05 and 0.01. Prints a Markdown table:
accuracy of each seed, mean and standard error, and the gain of the teacher over the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = ["+recipe=cifar_prune", "logger=none", "train.exact=false", "train.micro_batch_size=128"]


def accuracy(overrides: list[str]) -> tuple[float, float]:
    """(accuracy of the small model in percent, MACs that are left), of one process."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*RUN, *overrides, f"run_dir={folder}/run"]
        subprocess.run([sys.executable, "-m", "dist_compress", *words], check=True, stdout=sys.stderr)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return 100 * summary["accuracy/after"], summary["macs/after"] / summary["macs/before"]


def spread(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def main(
    images: str, student: str, teacher: str, epochs: int, seeds: int, lr: float, teacher_lr: float
) -> None:  # fmt: skip
    given = [f"data.root={images}", f"model.weights={student}", f"train.epochs={epochs}"]
    labels, learn = [f"optim.lr={lr}"], [f"optim.lr={teacher_lr}", "distillation=logits"]
    learn.append(f"distillation.teacher.model.weights={teacher}")
    print("| seed | without, % | with the teacher, % | MACs left |\n|---|---|---|---|", flush=True)
    alone, taught = [], []
    for seed in range(seeds):
        for found, extra in ((alone, labels), (taught, learn)):
            reached, macs = accuracy([*given, *extra, f"seed={seed}"])
            found.append(reached)
        print(f"| {seed} | {alone[-1]:.2f} | {taught[-1]:.2f} | {macs:.0%} |", flush=True)
    gains = [b - a for a, b in zip(alone, taught, strict=True)]
    print(f"| mean ± standard error | {spread(alone)} | {spread(taught)} | |\n")
    print(f"gain of the teacher: {spread(gains)} points")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "student", "teacher"):
        parser.add_argument(name)
    for name, value in (("epochs", 1), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, rate in (("lr", 0.05), ("teacher-lr", 0.01)):
        parser.add_argument(f"--{name}", type=float, default=rate)
    main(**vars(parser.parse_args()))
