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
