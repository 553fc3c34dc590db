"""The report page: complete, self-contained, escaped, well-formed; and a realistic sample of its arguments."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from dist_compress.reporting import charts, report

CONFIG = """seed: 0
model:
  source: cifar
  name: resnet20
data:
  source: digits
pruning:
  method: taylor
  sparse_ratio: 0.5
  compute: macs
  schedule:
    name: agp
speedup:
  tolerance: 1.0e-05
"""


def layers() -> list[dict[str, Any]]:
    rows = [{"name": "conv1", "before": 16, "after": 14, "params_before": 432, "params_after": 378}]
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            for conv, share in (("conv1", 0.35 + 0.08 * block), ("conv2", 0.62 if stage > 1 else 0.875)):
                after = max(1, round(width * share))
                params = width * width * 9
                row = {"before": width, "after": after, "params_before": params}
                rows.append({"name": f"layer{stage}.{block}.{conv}", "params_after": int(params * share * 0.8), **row})
    for row in rows:
        row["macs_before"] = row["params_before"] * 1024
        row["macs_after"] = row["params_after"] * 1024
    return rows


def metrics(steps: int = 240) -> list[dict[str, Any]]:
    rows = []
    for step in range(4, steps, 5):
        wobble = 0.08 * math.sin(step * 1.7) + 0.05 * math.cos(step * 0.61)
        row = {"step": step, "time": 1e9 + step, "train/loss": 0.12 + 2.2 * math.exp(-step / 35) + abs(wobble)}
        row["train/accuracy"] = min(0.995, 1 - 0.85 * math.exp(-step / 30) + 0.02 * wobble)
        row["train/lr"] = 0.05 * (1 + math.cos(math.pi * step / steps))
        row["pruning/sparse_ratio"] = 0.0 if step < 60 else 0.5 * (1 - (1 - min(1.0, (step - 55) / 80)) ** 3)
        row["train/grad_norm"] = 2.0 + 8 * math.exp(-step / 50) + wobble
        if step % 40 == 39:
            row |= {"eval/accuracy": 0.978 - 0.6 * math.exp(-step / 25), "eval/loss": 0.09 + 1.4 * math.exp(-step / 30)}
        rows.append(row)
    return rows


def arguments() -> dict[str, Any]:
    """A run as the runner reports it."""
    summary = {
        "accuracy/before": 0.98055, "accuracy/masked": 0.975, "accuracy/after": 0.975, "params/before": 272474,
        "params/after": 138211, "macs/before": 40813184, "macs/after": 19412736, "file_bytes/before": 1103972,
        "file_bytes/after": 566848, "latency_ms/p50/before/b1": 3.912, "latency_ms/p50/after/b1": 2.871,
        "latency_ms/p90/before/b1": 4.377, "latency_ms/p90/after/b1": 3.155, "latency_ms/p50/before/b32": 41.82,
        "latency_ms/p50/after/b32": 22.37, "latency_ms/p90/before/b32": 44.9, "latency_ms/p90/after/b32": 24.13,
        "verify/max_rel_diff": 3.128e-7, "fingerprint/masks": 0xD1E5C0DE12345678, "fingerprint/weights": 77,
        "world_size": 2, "backend": "ddp", "versions/torchvision": "0.29.0",
    }  # fmt: skip
    decisions = [
        {"step": 60 + 16 * i, "ratio": 0.5 * (1 - (1 - (i + 1) / 6) ** 3), "fingerprint": 0xABCDEF0123456789 + i * 999983}
        for i in range(6)
    ]
    return {
        "config_yaml": CONFIG,
        "summary": summary,
        "layers": layers(),
        "asked_but_kept": [
            {"name": "layer1.0.conv2", "asked": 0.5, "given": 0.125, "reason": "max_sparse_ratio of its group"},
            {"name": "conv1", "asked": 8, "given": 2, "reason": "shares its channels with layer1.*.conv2 (addition)"},
        ],
        "history": [{"step": 60 + 16 * i, "text": f"pruned to {i + 1}/6 of the target"} for i in range(6)]
        + [{"step": 140, "time": 3.0, "text": "shrunk: 40.81 M -> 19.41 M MACs"}],
        "metrics": metrics(),
        "decisions": decisions,
    }
