"""Sections of the schema of a run that config.py puts together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class QuantizationConfig:
    method: str | None = None  # a file of quantization/methods, or a dotted path; None: no quantization
    options: dict[str, Any] = field(default_factory=dict)
    start: float | str | None = None  # a duration; None: ptq at the end, others at once or after the last shrink
    freeze: float | str = 1.0  # a duration: from then on ranges and BatchNorm statistics stay as they are
    calibration_steps: int = 8  # global batches of the training data, without augmentation
    config_list: list[dict[str, Any]] = field(default_factory=list)  # []: all convolutions and linear layers
    default_settings: dict[str, Any] = field(default_factory=dict)  # {module type: {target: {key: value}}}
    reduce_range: bool | None = None  # weights of 7 bits; None: where ONNX is exported and the CPU needs it


@dataclass
class CheckpointConfig:
    every_steps: int | None = None
    keep: int = 2


@dataclass
class LoggerConfig:
    name: str = "wandb"  # wandb | none; metrics.jsonl is always written
    project: str = "dist_compress"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str | None = None  # None: WANDB_MODE, else offline


@dataclass
class LaunchConfig:
    nproc_per_node: int = 2  # ranks of each point of a sweep
