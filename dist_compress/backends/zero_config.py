"""What DeepSpeed is told: composed from our configuration, or a file of the user's that must agree with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_compress.config import Config
from dist_compress.errors import UserError

NEVER = 2**31 - 1
OURS = {  # sections of DeepSpeed's file for what is configured here
    "optimizer": "optim.* decides. Remove the section",
    "scheduler": "optim.schedule decides. Remove the section",
    "amp": "train.precision decides. Remove the section",
}
TOP = {  # what a file may say beside `zero_optimization`
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "communication_data_type", "fp16",
    "bf16", "torch_autocast", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "comms_logger",
    "prescale_gradients", "gradient_predivide_factor",
}  # fmt: skip
ZERO = {
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "overlap_comm", "sub_group_size", "ignore_unused_parameters", "offload_optimizer",
    "offload_param", "zero_hpz_partition_size", "mics_shard_size", "round_robin_gradients",
    "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold", "stage3_gather_16bit_weights_on_model_save", "memory_efficient_linear",
}  # fmt: skip


def compose(config: Config, options: Any, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Local, the same on every rank. Raises UserError for a file that disagrees with ours,
    and for what cannot be compressed."""
    micro = config.train.micro_batch_size
    rounds = -(-(config.train.global_batch_size // micro) // num_ranks)
    file = {} if options.config_file is None else _read(options, config, rounds)
    zero = {
        "stage": options.stage,
        "reduce_bucket_size": options.reduce_bucket_size,
        "allgather_bucket_size": options.allgather_bucket_size,
        "overlap_comm": options.overlap_comm,
        "stage3_prefetch_bucket_size": options.prefetch_bucket_size,
        **file.pop("zero_optimization", {}),
        "stage3_param_persistence_threshold": 0,  # small parameters have no copies that a projection would miss
        "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear, for all models of the process
    }
    if options.stage in (1, 2):
        zero["compute_grad_norm"] = False  # clipping is ours
    told: dict[str, Any] = {
        "steps_per_print": NEVER,
        "communication_data_type": "fp32",
        **file,
        # Rounds in which some ranks have no micro-batch count as if they had one: only their product has to fit.
        "train_batch_size": micro * rounds * num_ranks,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": 0.0,  # ours is another one; not to say so means 1.0
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    if sums(options):
        told["gradient_allreduce_op"] = "sum"
    if config.train.precision == "bf16":  # no module's gradients are summed in bfloat16
        told["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return told


def sums(options: Any) -> bool:
    """Whether DeepSpeed sums gradients over the ranks; stage 3 can only take means of them."""
    return options.stage < 3


def _read(options: Any, config: Config, rounds: int) -> dict[str, Any]:
    """The user's file without what is decided here. Raises UserError."""
    path = Path(options.config_file)
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"backend.config_file={path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"backend.config_file={path}: is no JSON: {error}.") from None
    if not isinstance(file, dict) or not isinstance(file.get("zero_optimization", {}), dict):
        raise UserError(f"backend.config_file={path}: must be a JSON object, and so must its zero_optimization.")
    file = _without_auto(file)
    zero = file.get("zero_optimization", {})
    _refuse(path, file, zero)
    _compare(path, file, zero, options, config, rounds)
    for key in ("gradient_clipping", "torch_autocast", "fp16", "bf16"):
        file.pop(key, None)  # off, or as ours
    return file


def _without_auto(told: dict[str, Any]) -> dict[str, Any]:
    """Without what Hugging Face's Trainer would fill in."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in told.items()
        if value != "auto"
    }


def _refuse(path: Path, file: dict[str, Any], zero: dict[str, Any]) -> None:
    def wrong(key: str, value: Any, why: str) -> UserError:
        return UserError(f"backend.config_file={path}: {key}={json.dumps(value)}: {why}.")

    for key, why in OURS.items():
        if file.get(key):
            raise wrong(key, file[key], why)
    for key in ("fp16", "bf16"):
        if file.get(key, {}).get("enabled"):
            raise wrong(
                f"{key}.enabled", True,
                "what is compressed are float32 weights, so the model would compute with a rounded copy of them. "
                "Remove it and set train.precision=bf16, which computes in bfloat16 where that is safe",
            )  # fmt: skip
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise wrong(
                f"zero_optimization.{key}", zero[key],
                "weights outside the accelerator cannot be compressed. Remove it; a higher stage, more ranks or "
                "backend=fsdp also save memory",
            )  # fmt: skip
    one = {"zero_hpz_partition_size": 1, "mics_shard_size": -1, "round_robin_gradients": False,
           "stage3_param_persistence_threshold": 0}  # fmt: skip
    for key, only in one.items():
        if zero.get(key, only) not in (only, 0):
            raise wrong(
                f"zero_optimization.{key}", zero[key],
                f"a weight must lie in one place, the one that is compressed. Remove it, or set {json.dumps(only)}",
            )  # fmt: skip
    if file.get("prescale_gradients") or file.get("gradient_predivide_factor", 1) != 1:
        raise wrong("prescale_gradients", file.get("prescale_gradients"), "gradients are summed. Remove it")
    for name, section, known in (("", file, TOP | {"zero_optimization"}), ("zero_optimization.", zero, ZERO)):
        if unknown := sorted(section.keys() - known):
            raise wrong(
                name + unknown[0], section[unknown[0]],
                f"is not supported here. Remove it. Supported there: {', '.join(sorted(known))}",
            )  # fmt: skip


def _compare(path: Path, file: dict[str, Any], zero: dict[str, Any], options: Any, config: Config, rounds: int) -> None:
    """Raise UserError for a number that is not ours."""
    train = config.train
    autocast = file.get("torch_autocast", {})
    precision = "bf16" if autocast.get("enabled") and autocast.get("dtype", "bfloat16") == "bfloat16" else "fp32"
    if autocast.get("enabled") and precision != "bf16":
        precision = str(autocast.get("dtype"))
    pairs = [
        ("zero_optimization.stage", zero.get("stage", options.stage), "backend.stage", options.stage),
        ("train_batch_size", file.get("train_batch_size"), "train.global_batch_size", train.global_batch_size),
        ("train_micro_batch_size_per_gpu", file.get("train_micro_batch_size_per_gpu"), "train.micro_batch_size",
         train.micro_batch_size),
        ("gradient_accumulation_steps", file.get("gradient_accumulation_steps"),
         "train.global_batch_size / (train.micro_batch_size * ranks), rounded up,", rounds),
        ("gradient_clipping", file.get("gradient_clipping") or None, "train.clip_norm", train.clip_norm),
        ("torch_autocast.dtype", precision if autocast else None, "train.precision", train.precision),
    ]  # fmt: skip
    for theirs, value, ours, wanted in pairs:
        if value is not None and value != wanted:
            raise UserError(
                f"backend.config_file={path}: {theirs}={value}, but {ours} is {wanted}. Change one of them, or remove "
                f"{theirs} from the file: what is not there follows ours."
            )
