"""CIFAR-10 with given weights: the same accuracy at 1, 2 and 3 ranks; half of the MACs gone in one epoch.

    python benchmarks/cifar10.py IMAGES RESNET20.safetensors RESNET56.safetensors

IMAGES/{train,test}/<class>/*.png; weights of the option-A CIFAR nets. Prints a Markdown table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

EVALUATE = [
    "data=image_folder", "data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]", "logger=none",
    "train.max_steps=0", "train.eval_batch_size=250", "train.channels_last=true",
]  # fmt: skip


def run(num_ranks: int, run_dir: Path, *overrides: str) -> dict[str, float]:
    """Start the ranks; the summary of the run."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m", "dist_compress"]
    subprocess.run([sys.executable, *command, *overrides, f"run_dir={run_dir}"], check=True, stdout=sys.stderr)
    return json.loads((run_dir / "summary.json").read_text())


def main(images: str, resnet20: str, resnet56: str) -> None:
    rows = ["| run | ranks | accuracy | loss |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for model, weights, num_ranks in (
            ("resnet20", resnet20, 1), ("resnet20", resnet20, 2), ("resnet20", resnet20, 3), ("resnet56", resnet56, 2),
        ):  # fmt: skip
            where = [f"model={model}", f"model.weights={weights}", f"data.root={images}"]
            got = run(num_ranks, Path(folder) / f"{model}_{num_ranks}", *where, *EVALUATE)
            rows.append(f"| {model} | {num_ranks} | {got['accuracy/after']:.2%} | {got['loss/after']!r} |")
        got = run(
            2, Path(folder) / "prune",
            "+recipe=cifar_prune", "logger=none", f"data.root={images}", f"model.weights={resnet20}",
        )  # fmt: skip
    for when in ("before", "masked", "shrunk", "after"):
        rows.append(f"| cifar_prune, {when} | 2 | {got[f'accuracy/{when}']:.2%} | {got[f'loss/{when}']!r} |")
    print("\n".join(rows))
    macs, params = ([f"{got[f'{name}/{when}']:,}" for when in ("before", "after")] for name in ("macs", "params"))
    print(f"\nMACs {' -> '.join(macs)}, parameters {' -> '.join(params)}, masked vs shrunk "
          f"{got['verify/max_rel_diff']:.1e}")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
