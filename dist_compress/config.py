"""The schema of a run: every shared dataclass, strictly merged from what Hydra composed. The only omegaconf import.

A method's own options are not here: they are the dataclass `Options` in the method's file, merged with `merge`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """`source` names the builder; `_target_` (a user's callable) replaces source, name and kwargs."""

    source: str = "cifar"  # cifar | torchvision | timm | hf
    name: str = "resnet20"  # for hf: a local folder, or a model_type with kwargs as its config
    num_classes: int | None = None  # None: as many as the data has
    weights: str | None = None  # a .safetensors file, or a torch file readable with weights_only
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] | None = None  # filled from `_target_` and its siblings


@dataclass
class DataConfig:
    source: str = "digits"  # digits | image_folder | cifar10 | imagenet
    root: str | None = None
    image_size: int = 32
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    augment: str = "none"  # none | pad_crop | pad_crop_flip | random_resized_crop
    in_memory: bool | None = None  # None: when the decoded set is at most 2 GiB
    num_workers: int = 2  # decoding processes per rank when not in memory
    target: dict[str, Any] | None = None


@dataclass
class TaskConfig:
    source: str = "classification"
    label_smoothing: float = 0.0
    target: dict[str, Any] | None = None


@dataclass
class TrainConfig:
    max_steps: int | None = None  # optimizer steps; wins over epochs
    epochs: float = 1.0
    global_batch_size: int = 64
    micro_batch_size: int = 32
    eval_batch_size: int | None = None  # None: micro_batch_size
    exact: bool = False  # equal bits at any number of ranks
    precision: str = "fp32"  # fp32 | bf16 (autocast)
    clip_norm: float | None = None
    sync_batchnorm: bool = False
    num_threads: int | None = None  # CPU threads per rank; None: 1 when exact, else torch's choice
    log_every_steps: int = 10


@dataclass
class OptimConfig:
    name: str = "SGD"  # any class of torch.optim
    lr: float = 0.1
    weight_decay: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. momentum, nesterov, betas
    schedule: str = "cosine"  # constant | cosine | step
    warmup: float | str = 0.0  # a duration: fraction of the run, "100steps" or "2epochs"
    milestones: list[float | str] = field(default_factory=list)  # for step: durations
    gamma: float = 0.1  # for step
    final_lr: float = 0.0  # for cosine


@dataclass
class BackendConfig:
    name: str = "ddp"
    timeout_s: float = 600.0


@dataclass
class ScheduleConfig:
    name: str = "one_shot"  # one_shot | linear | agp, or a dotted path
    start: float | str = 0.0  # durations
    end: float | str = 0.0
    num_decisions: int = 1  # evenly spaced between start and end, the last one exactly at end


@dataclass
class PruningConfig:
    method: str | None = None  # a file of pruning/methods, or a dotted path; None: no pruning
    options: dict[str, Any] = field(default_factory=dict)
    sparse_ratio: float | None = None  # inherited by entries that set none
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compute: str = "channels"  # channels | params | macs: the currency of a global group
    config_list: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)  # reserved


@dataclass
class SpeedupConfig:
    enabled: bool = True
    at: float | str | None = None  # when to shrink; None: at the last pruning decision
    tolerance: float = 1e-5  # largest max|shrunk - masked| / max|masked| that may ship


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


@dataclass
class Config:
    seed: int = 0
    run_dir: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    speedup: SpeedupConfig = field(default_factory=SpeedupConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: list[str] = field(default_factory=lambda: ["safetensors"])
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
