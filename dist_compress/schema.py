"""Sections of the schema of a run that config.py puts together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    source: str = "digits"  # a file of training/data: digits | image_folder | cifar10 | imagenet | text_file | ...
    root: str | None = None
    image_size: int = 32
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    augment: str = "none"  # none | pad_crop | pad_crop_flip | random_resized_crop
    in_memory: bool | None = None  # None: when the decoded set is at most 2 GiB
    num_workers: int = 2  # decoding threads per rank when not in memory
    tokenizer: str | None = None  # of text: words, or a local folder of Hugging Face's; None: bytes
    sequence_length: int = 128  # tokens of a sample of text
    text_column: str = "text"  # of hf_dataset
    label_column: str | None = None  # of hf_dataset; None: the text itself is what is learned
    target: dict[str, Any] | None = None


@dataclass
class TaskConfig:
    source: str = "classification"  # classification | causal_lm
    label_smoothing: float = 0.0  # of classification
    fused_head: bool = False  # of causal_lm: output layer and losses in one, so that no logits are ever whole
    target: dict[str, Any] | None = None


@dataclass
class TrainConfig:
    max_steps: int | None = None  # optimizer steps; wins over epochs
    epochs: float = 1.0
    global_batch_size: int = 64
    micro_batch_size: int = 32
    eval_batch_size: int | None = None  # None: micro_batch_size
    exact: bool | None = False  # equal bits at any number of ranks; null: where the backend can
    precision: str = "fp32"  # fp32 | bf16 (autocast)
    clip_norm: float | None = None
    sync_batchnorm: bool = False
    compile: bool = False  # the passes that train, by torch.compile
    activation_checkpointing: list[str] = field(default_factory=list)  # class names of modules that run again
    channels_last: bool = False  # memory format of images and convolutions: often faster
    num_threads: int | None = None  # CPU threads per rank; None: 1 when exact, else torch's choice
    log_every_steps: int = 10


@dataclass
class SizeConfig:
    bytes: float | None = None  # of the quantized parameters; up to 1: a fraction of their float size


@dataclass
class MixedConfig:
    """How many bits each weight gets whose quant_dtype is left open."""

    candidates: list[str] = field(default_factory=list)  # dtypes to measure and choose among; []: one for all
    at_most: SizeConfig = field(default_factory=SizeConfig)  # None: measured and shown, nothing is chosen
    samples: int = 512  # of the training data, on which a candidate is measured


@dataclass
class QuantizationConfig:
    method: str | None = None  # a file of quantization/methods, or a dotted path; None: no quantization
    options: dict[str, Any] = field(default_factory=dict)
    start: float | str | None = None  # a duration; None: ptq at the end, others at once or after the last shrink
    freeze: float | str = 1.0  # a duration: from then on ranges and BatchNorm statistics stay as they are
    calibration_steps: int = 8  # global batches of the training data, without augmentation
    config_list: list[dict[str, Any]] = field(default_factory=list)  # []: all convolutions and linear layers
    default_settings: dict[str, Any] = field(default_factory=dict)  # {module type: {target: {key: value}}}
    mixed: MixedConfig = field(default_factory=MixedConfig)
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
