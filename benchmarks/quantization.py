"""Quantizing resnet20 on CIFAR-10 from given weights: accuracy lost over seeds, and ONNX Runtime's beside it.

    python benchmarks/quantization.py IMAGES RESNET20.safetensors [--seeds 3] [--methods ptq add qat lsq]

IMAGES/{train,test}/<class>/*.png; weights of the option-A CIFAR nets. A row for each method: int8 after training, int8
in one epoch, weights of 4 bits in two epochs. Every exported file computes all test images with ONNX Runtime. Then the
latencies of the last file of ptq (and add), int8 and fp32 in turns. Prints Markdown and what the CPU has for int8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from dist_compress.config import DataConfig, ModelConfig
from dist_compress.export import onnx as exporter
from dist_compress.models import build, load_weights
from dist_compress.quantization import cpu
from dist_compress.training import data

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RUN = [
    "model=resnet20", "data=image_folder", f"data.mean={MEAN}", f"data.std={STD}", "data.augment=pad_crop_flip",
    "logger=none", "train.channels_last=true", "train.global_batch_size=128", "train.micro_batch_size=128",
    "train.eval_batch_size=250", "optim=sgd", "optim.weight_decay=0.0001", "export=[safetensors,onnx]",
]  # fmt: skip
ADDITIONS = "[{op_types: [Conv2d, Linear, add]}]"
METHODS = {
    "ptq": ["quantization=ptq", "train.max_steps=0"],
    "add": ["quantization=ptq", "train.max_steps=0", f"quantization.config_list={ADDITIONS}"],
    "qat": ["quantization=qat", "train.epochs=1", "optim.lr=0.005"],
    "lsq": ["quantization=lsq", "train.epochs=2", "optim.lr=0.01"],
}
TITLES = {
    "ptq": "int8, ptq", "add": "int8, ptq, additions too", "qat": "int8, qat, 1 epoch",
    "lsq": "int4 weights, lsq, 2 epochs",
}  # fmt: skip


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def accuracy(run: Any, split: Any) -> float:
    right = 0
    for first in range(0, split.num_samples, 250):
        batch = split.batch(torch.arange(first, min(first + 250, split.num_samples)), None)
        logits = torch.from_numpy(run.run(None, {run.get_inputs()[0].name: batch["inputs"].numpy()})[0])
        right += int((logits.argmax(1) == batch["targets"]).sum())
    return right / split.num_samples


def latencies(runs: dict[str, Any], batch: torch.Tensor) -> dict[str, float]:
    """Median ms of a call, turn by turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(40):
        for name, run in runs.items():
            begin = time.perf_counter()
            run.run(None, {run.get_inputs()[0].name: batch.numpy()})
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in taken.items()}


def row(method: str, found: list[dict[str, float]]) -> str:
    after = [100 * f["after"] for f in found]
    error = statistics.stdev(after) / len(after) ** 0.5 if len(after) > 1 else 0.0
    lost = ", ".join(f"{100 * (f['before'] - f['after']):+.2f}" for f in found)
    runtime = max((100 * (f["runtime"] - f["after"]) for f in found), key=abs)
    return (
        f"| {TITLES[method]} | {100 * found[0]['before']:.2f} % | {statistics.mean(after):.2f} ± {error:.2f} % "
        f"| {lost} | {runtime:+.2f} | {max(f['max_diff'] for f in found):.1f} |"
    )


def main(images: str, weights: str, seeds: int, methods: list[str]) -> None:
    where = [f"data.root={images}", f"model.weights={weights}"]
    held_out = data.build(DataConfig(source="image_folder", root=images, mean=MEAN, std=STD), seed=0).eval
    print(
        "| resnet20 | float | quantized | points lost, by seed | ONNX Runtime, points more | max_diff |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    took = {}
    for method in methods:
        found = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                run_dir = Path(folder) / "run"
                words = [*RUN, *where, *METHODS[method], f"seed={seed}", f"run_dir={run_dir}"]
                subprocess.run([sys.executable, "-m", "dist_compress", *words], check=True, stdout=sys.stderr)
                summary = json.loads((run_dir / "summary.json").read_text())
                int8 = session(run_dir / exporter.FILE)
                found.append(
                    {
                        "before": summary["accuracy/before"], "after": summary["accuracy/after"],
                        "max_diff": summary["export/onnx/max_diff"], "runtime": accuracy(int8, held_out),
                    }
                )  # fmt: skip
                if method in ("ptq", "add"):
                    dense = build(ModelConfig(**json.loads((run_dir / "model.json").read_text())["model"]), 10, 0)
                    load_weights(dense, weights)
                    example = held_out.batch(torch.arange(2), None)["inputs"]
                    exporter.export(folder, dense.eval(), None, None, ((example,), {}))  # type: ignore[arg-type]
                    runs = {"fp32": session(Path(folder) / exporter.FILE), "int8": int8}
                    batches = {n: held_out.batch(torch.arange(n), None)["inputs"] for n in (1, 32)}
                    took[method] = {n: latencies(runs, batch) for n, batch in batches.items()}
        print(row(method, found), flush=True)
    print()
    for method, by_size in took.items():
        for size, ms in by_size.items():
            print(f"{TITLES[method]}: batch {size}, one thread: fp32 {ms['fp32']:.2f} ms, int8 {ms['int8']:.2f} ms")
    print(f"int8 dot products: {'missing, weights of 7 bits' if cpu.needs_reduced_range() else 'yes'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    given = parser.parse_args()
    main(given.images, given.weights, given.seeds, given.methods)
