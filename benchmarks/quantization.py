"""int8 after training on CIFAR-10 with given weights: accuracy lost, and ONNX Runtime's beside it.

    python benchmarks/quantization.py IMAGES RESNET20.safetensors [OVERRIDE ...]

IMAGES/{train,test}/<class>/*.png; weights of the option-A CIFAR nets. One run of `quantization=ptq` without a training
step, then ONNX Runtime on all test images, int8 and fp32 file in turns. Prints a Markdown table and the CPU's flags.
"""

from __future__ import annotations

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
    "data=image_folder", f"data.mean={MEAN}", f"data.std={STD}", "logger=none", "train.max_steps=0",
    "train.eval_batch_size=250", "quantization=ptq", "export=[safetensors,onnx]",
]  # fmt: skip


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


def main(images: str, weights: str, *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        words = [*RUN, f"data.root={images}", f"model.weights={weights}", f"run_dir={run_dir}", *overrides]
        subprocess.run([sys.executable, "-m", "dist_compress", *words], check=True, stdout=sys.stderr)
        summary = json.loads((run_dir / "summary.json").read_text())
        held_out = data.build(DataConfig(source="image_folder", root=images, mean=MEAN, std=STD), seed=0).eval
        dense = build(ModelConfig(**json.loads((run_dir / "model.json").read_text())["model"]), 10, 0)
        load_weights(dense, weights)
        example = held_out.batch(torch.arange(2), None)["inputs"]
        exporter.export(folder, dense.eval(), None, None, ((example,), {}))  # type: ignore[arg-type]
        runs = {"fp32": session(Path(folder) / exporter.FILE), "int8": session(run_dir / exporter.FILE)}
        ort = accuracy(runs["int8"], held_out)
        took = latencies(runs, held_out.batch(torch.arange(32), None)["inputs"])
    print("| | accuracy |\n|---|---|")
    for name in ("before", "after"):
        print(f"| {name} | {summary[f'accuracy/{name}']:.2%} |")
    print(f"| ONNX Runtime, int8 file | {ort:.2%} |\n")
    print(f"lost {100 * (summary['accuracy/before'] - summary['accuracy/after']):+.2f} points; ONNX Runtime against "
          f"the fake-quantized model {100 * (ort - summary['accuracy/after']):+.2f} points; max_diff "
          f"{summary['export/onnx/max_diff']:.2f} / 255 of the range")  # fmt: skip
    print(f"ONNX Runtime, batch 32, one thread: fp32 {took['fp32']:.1f} ms, int8 {took['int8']:.1f} ms")
    print(f"int8 dot products: {'missing, weights of 7 bits' if cpu.needs_reduced_range() else 'yes'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
