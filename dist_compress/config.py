"""The schema of a run: every shared dataclass, strictly merged from what Hydra composed.

The only omegaconf import. A method's own options are not here: they are the dataclass `Options` in the
method's file, merged with `merge`. Nothing is converted silently but int to float and int to str: a key that
the schema lacks, a value of another type or out of range is a UserError that names the full key. All
functions are local and give the same on every rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_compress import strict
from dist_compress.errors import UserError
from dist_compress.schema import (
    CheckpointConfig,
    DataConfig,
    LaunchConfig,
    LoggerConfig,
    QuantizationConfig,
    TaskConfig,
    TrainConfig,
)

T = TypeVar("T")


@dataclass
class ModelConfig:
    """`source` names the builder; `_target_` (a user's callable) replaces source, name and kwargs."""

    source: str = "cifar"  # cifar | torchvision | timm | hf
    name: str = "resnet20"  # for hf: a local folder, or a model_type with kwargs as its config
    head: str = "image_classification"  # for hf: or sequence_classification, or causal_lm
    num_classes: int | None = None  # None: as many as the data has
    weights: str | None = None  # a .safetensors file, or a torch file readable with weights_only
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] | None = None  # filled from `_target_` and its siblings


@dataclass
class OptimConfig:
    name: str = "SGD"  # any class of torch.optim
    lr: float = 0.1
    weight_decay: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. momentum, nesterov, betas
    schedule: str = "cosine"  # constant | cosine | step
    warmup: float | str = 0.0  # a duration: fraction of the run, "100steps" or "2epochs"
    restarts: list[float | str] = field(default_factory=list)  # durations at which the schedule begins anew
    milestones: list[float | str] = field(default_factory=list)  # for step: durations
    gamma: float = 0.1  # for step
    final_lr: float = 0.0  # for cosine


@dataclass
class BackendConfig:
    """Further keys are the backend's own: the `Options` of its file."""

    name: str = "ddp"  # a file of backends: ddp | fsdp
    timeout_s: float = 600.0
    options: dict[str, Any] = field(default_factory=dict)  # filled from the further keys


@dataclass
class ScheduleConfig:
    name: str = "one_shot"  # one_shot | linear | agp | exponential, or a dotted path
    start: float | str = 0.0  # durations
    end: float | str = 0.0
    num_decisions: int = 1  # evenly spaced between start and end, the last one exactly at end


@dataclass
class AtMostConfig:
    """What the whole model may cost in the end; several hold at once. None: no limit."""

    macs: float | None = None  # of one sample
    params: float | None = None
    latency_ms: float | None = None


@dataclass
class LatencyConfig:
    """Where measured latencies come from, when something is asked in them."""

    table: str | None = None  # a costs.json of another run or device; None: measured when the run starts
    batch_size: int = 1
    time_s: float = 20.0  # spent on measuring


@dataclass
class SearchConfig:
    evaluations: int = 0  # of candidates, the uniform one included; 0: global groups rank their units instead
    samples: int = 512  # of the training data, on which a candidate is measured
    objective: str = "loss"  # or a metric of the task, of which more is better
    start_temperature: float = 0.1  # relative change of the objective that is shrugged off at the start
    end_temperature: float = 0.001
    perturbation: float = 0.5  # of the logarithm of a ratio, at the start


@dataclass
class PruningConfig:
    method: str | None = None  # a file of pruning/methods, or a dotted path; None: no pruning
    options: dict[str, Any] = field(default_factory=dict)
    sparse_ratio: float | None = None  # inherited by entries that set none
    at_most: AtMostConfig = field(default_factory=AtMostConfig)  # instead: shared by entries that set no ratio
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compute: str = "channels"  # channels | params | macs | latency: the currency of a global group
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    search: SearchConfig = field(default_factory=SearchConfig)  # for the ratio of each set in a global group
    config_list: list[dict[str, Any]] = field(default_factory=list)
    default_settings: dict[str, Any] = field(default_factory=dict)  # {module type: {target: {key: value}}}
    stages: list[dict[str, Any]] = field(default_factory=list)  # reserved


@dataclass
class TeacherConfig:
    # online: each rank runs the teacher on its own samples | vocab: so, but for the output layers, whose rows are split
    # over the ranks | store: its answers are on disk | self: as online, the teacher is the student as it is at `start`
    mode: str = "online"
    start: float | str = 0.5  # a duration, for mode=self; the task's loss counts whole until then
    store: str | None = None  # folder of a teacher store, for mode=store
    model: ModelConfig = field(default_factory=ModelConfig)  # with its weights
    precision: str = "fp32"  # fp32 | bf16 | fp16: of the teacher's weights and forward passes
    sharded: bool = False  # each rank holds a part of its weights; else all of them


@dataclass
class StoreConfig:
    """A teacher store to write: this run's model, as delivered, asked about every training sample."""

    write: str | None = None  # its folder
    encoding: str = "auto"  # dense_fp16 | topk_u8 | topk_fp16; auto: dense up to 1000 classes, then topk_u8
    k: int = 48  # entries of a top-k
    draws: int = 16  # of the others, for each of the temperatures; 0: only their mass is stored
    temperatures: list[float] = field(default_factory=lambda: [1.0])  # that a top-k will serve
    views: int = 1  # augmented versions of each sample


@dataclass
class RampConfig:
    """From the value of the section to another one."""

    name: str = "linear"  # linear | cosine
    start: float | str = 0.0  # durations
    end: float | str = 1.0
    to: float | None = None  # the value from `end` on; None: it does not change


@dataclass
class DistillationConfig:
    method: str | None = None  # a file of distillation/methods, or a dotted path; None: no distillation
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0  # of the distillation losses
    weight_ramp: RampConfig = field(default_factory=RampConfig)
    task_weight: float = 1.0  # of the task's own loss
    temperature: float = 1.0
    temperature_ramp: RampConfig = field(default_factory=RampConfig)
    config_list: list[dict[str, Any]] = field(default_factory=list)  # hidden states, for methods that compare them
    translator_lr: float = 0.001  # of the maps between widths of student and teacher (Adam)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    store: StoreConfig = field(default_factory=StoreConfig)


@dataclass
class SpeedupConfig:
    enabled: bool = True
    at: float | str | None = None  # when to shrink; None: at the last pruning decision
    tolerance: float = 1e-5  # largest max|shrunk - masked| / max|masked| that may ship
    norm: str = "keep"  # keep | exact | plain: whether normalised dims may go, and by what width norms then divide
    round_to: int = 1  # kept counts of dims that shrink are multiples of it
    keep: list[str] = field(default_factory=list)  # names or patterns of parameters and modules that stay whole
    barrier: list[str] = field(default_factory=list)  # of modules: all that their operators touch stays whole


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
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    speedup: SpeedupConfig = field(default_factory=SpeedupConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: list[str] = field(default_factory=lambda: ["safetensors"])
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


# What the types do not say. Bounds are inclusive unless the text says otherwise.
_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "model.num_classes": 1,
    "distillation.teacher.model.num_classes": 1,
    "distillation.weight": 0,
    "distillation.weight_ramp.to": 0,
    "distillation.task_weight": 0,
    "distillation.store.k": 1,
    "distillation.store.draws": 0,
    "distillation.store.views": 1,
    "data.image_size": 1,
    "data.num_workers": 0,
    "data.sequence_length": 4,
    "train.max_steps": 0,
    "train.epochs": 0,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.eval_batch_size": 1,
    "train.num_threads": 1,
    "train.log_every_steps": 1,
    "optim.lr": 0,
    "optim.weight_decay": 0,
    "optim.final_lr": 0,
    "pruning.schedule.num_decisions": 1,
    "pruning.latency.batch_size": 1,
    "pruning.search.evaluations": 0,
    "pruning.search.samples": 1,
    "quantization.calibration_steps": 1,
    "quantization.mixed.samples": 1,
    "speedup.round_to": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "launch.nproc_per_node": 1,
}
_ABOVE_ZERO = (
    "train.clip_norm", "optim.gamma", "backend.timeout_s", "speedup.tolerance", "distillation.temperature",
    "distillation.temperature_ramp.to", "distillation.translator_lr",
    "pruning.at_most.macs", "pruning.at_most.params", "pruning.at_most.latency_ms", "pruning.latency.time_s",
    "quantization.mixed.at_most.bytes",
    "pruning.search.start_temperature", "pruning.search.end_temperature", "pruning.search.perturbation",
)  # fmt: skip
_BELOW_ONE = ("pruning.sparse_ratio", "task.label_smoothing")  # and at least 0
_CHOICES = {
    "model.head": ("image_classification", "sequence_classification", "causal_lm"),
    "distillation.teacher.model.head": ("image_classification", "sequence_classification", "causal_lm"),
    "data.augment": ("none", "pad_crop", "pad_crop_flip", "random_resized_crop"),
    "train.precision": ("fp32", "bf16"),
    "optim.schedule": ("constant", "cosine", "step"),
    "pruning.compute": ("channels", "params", "macs", "latency"),
    "distillation.teacher.mode": ("online", "vocab", "store", "self"),
    "distillation.store.encoding": ("auto", "dense_fp16", "topk_u8", "topk_fp16"),
    "distillation.teacher.precision": ("fp32", "bf16", "fp16"),
    "distillation.weight_ramp.name": ("linear", "cosine"),
    "distillation.temperature_ramp.name": ("linear", "cosine"),
    "speedup.norm": ("keep", "exact", "plain"),
    "logger.name": ("wandb", "none"),
    "logger.mode": ("online", "offline", "disabled"),
}
# Sections where `_target_` names the user's own callable.
_WITH_TARGET = {"model": ModelConfig, "data": DataConfig, "task": TaskConfig, "distillation.teacher.model": ModelConfig}


def load(composed: DictConfig | Mapping[str, Any]) -> Config:
    """The checked config of a composed one. Raises UserError with the full key."""
    try:
        node = OmegaConf.create(composed)  # type: ignore[arg-type]
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(values, dict)
    values = {str(key): value for key, value in values.items()}
    for section, cls in _WITH_TARGET.items():
        inner: Any = values
        for name in section.split("."):
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            _gather_target(inner, section, cls)
    _gather_options(values)
    config = merge(Config, values, "")
    _check_ranges(config)
    return config


def from_yaml(text: str) -> Config:
    """The inverse of `to_yaml`, as strict as `load`."""
    return load(OmegaConf.create(text))  # type: ignore[arg-type]


def to_yaml(config: Any, sections: Sequence[str] | None = None) -> str:
    """Any dataclass of the schema as YAML, keys in schema order; of `sections` only those."""
    values = asdict(config)
    return OmegaConf.to_yaml(OmegaConf.create({k: v for k, v in values.items() if sections is None or k in sections}))


def merge(cls: type[T], values: Mapping[str, Any], key: str) -> T:
    """An instance of the dataclass `cls` from plain `values`, which lie under `key` of the user's config."""
    try:
        return strict.merge(cls, values, key)
    except strict.UnknownKey as error:
        raise unknown_key(error.key, error.siblings) from None


def unknown_key(key: str, siblings: list[str] | None = None) -> UserError:
    """The error for a key the schema lacks, with the closest there is. `siblings`: the keys at its place."""
    section, _, name = key.rpartition(".")
    if section and siblings is None and section not in _sections():  # inside a free mapping, such as kwargs
        return UserError(f"{key}: not set so far. Add it with +{key}=...")
    if siblings is None:
        siblings = [k.rpartition(".")[2] for k in _keys(Config) if k.rpartition(".")[0] == section]
    close = [strict.join(section, n) for n in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)]
    if not close:  # right name, wrong place
        close = [k for k in _keys(Config) if k.rpartition(".")[2] == name]
    if not close:
        close = difflib.get_close_matches(key, list(_keys(Config)), n=1, cutoff=0.7)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Keys there: {', '.join(siblings) or 'none'}."
    return UserError(f"{key}: no such key. {hint}")


def _keys(cls: Any, key: str = "") -> Iterator[str]:
    """Full names of all fields, sections included."""
    for name, hint in get_type_hints(cls).items():
        yield strict.join(key, name)
        if is_dataclass(hint):
            yield from _keys(hint, strict.join(key, name))


def _sections() -> set[str]:
    return {key.rpartition(".")[0] for key in _keys(Config)}


def _gather_target(values: dict[str, Any], section: str, cls: type) -> None:
    """Move `_target_` and the keys beside it that the section lacks into `target`, in place."""
    if "_target_" not in values:
        return
    if values.get("target"):
        raise UserError(f"{section}.target and {section}._target_ are both set. Keep one of them.")
    known = get_type_hints(cls)
    values["target"] = {name: values.pop(name) for name in list(values) if name not in known}


def _gather_options(values: dict[str, Any]) -> None:
    """Move what the schema of a backend lacks into its `options`, in place."""
    backend = values.get("backend")
    if isinstance(backend, dict):
        own = {name: backend.pop(name) for name in list(backend) if name not in get_type_hints(BackendConfig)}
        backend["options"] = {**(backend.get("options") or {}), **own}


def _select(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _check_ranges(config: Config) -> None:
    for key, low in _AT_LEAST.items():
        value = _select(config, key)
        if value is not None and not value >= low:
            raise UserError(f"{key}={value}: must be at least {low:g}.")
    for key in _ABOVE_ZERO:
        value = _select(config, key)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value}: must be above 0.")
    for key in _BELOW_ONE:
        value = _select(config, key)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{key}={value}: must be at least 0 and below 1.")
    for key, choices in _CHOICES.items():
        value = _select(config, key)
        if value is not None and value not in choices:
            raise UserError(f"{key}={value!r}: no such choice. Available: {', '.join(choices)}.")
    if config.train.global_batch_size % config.train.micro_batch_size:
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={config.train.micro_batch_size}. Change one of the two."
        )
    if config.pruning.stages:
        raise UserError("pruning.stages is reserved and must stay empty: use pruning.schedule.")
