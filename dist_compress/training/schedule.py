"""How long the run is, and the learning rate at a step: pure functions of the configuration and the step."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from dist_compress import comm
from dist_compress.config import Config, OptimConfig
from dist_compress.duration import duration
from dist_compress.errors import UserError

SCHEDULES = ("constant", "cosine", "step")


@dataclass(frozen=True)
class RunLength:
    """Facts of the run, the same at any number of ranks."""

    num_micro: int  # M: micro-batches of one optimizer step
    total_steps: int
    steps_per_epoch: float


def run_length(config: Config, num_samples: int) -> RunLength:
    """Raises UserError when the batch sizes do not fit each other, the ranks or the data. Local."""
    train, size = config.train, comm.world_size()
    batches = f"train.global_batch_size={train.global_batch_size}, train.micro_batch_size={train.micro_batch_size}"
    if train.micro_batch_size < 1 or train.global_batch_size % max(train.micro_batch_size, 1):
        raise UserError(
            f"{batches}: the global batch must be a whole number of micro-batches of at least one sample. Change one "
            "of the two."
        )
    if num_samples < size:
        raise UserError(
            f"data.root or data.source: {num_samples} training samples for world size {size}: fewer samples than "
            "ranks. Start fewer ranks (--nproc-per-node) or use more data."
        )
    per_epoch = num_samples / train.global_batch_size
    if train.max_steps is None and train.epochs < 0 or (train.max_steps or 0) < 0:
        raise UserError(f"train.max_steps={train.max_steps}, train.epochs={train.epochs}: give a length >= 0.")
    total = math.ceil(train.epochs * per_epoch) if train.max_steps is None else train.max_steps
    num_micro = train.global_batch_size // train.micro_batch_size
    if num_micro < size and total > 0:  # an evaluation has no global batch
        raise UserError(
            f"{batches}: {num_micro} micro-batches cannot occupy world size {size}. Lower train.micro_batch_size to "
            f"{max(train.global_batch_size // size, 1)} or less, raise train.global_batch_size, or start fewer ranks."
        )
    if train.sync_batchnorm and num_micro % size:
        raise UserError(
            f"train.sync_batchnorm=true with {batches}: {num_micro} micro-batches leave ranks without one in the "
            f"last round at world size {size}. Choose sizes whose quotient is a multiple of {size}."
        )
    return RunLength(num_micro, total, per_epoch)


class LearningRate:
    """`rate(step)`: linear warm-up, then constant, cosine or steps down; begun anew at every restart.

    Cosine with warm restarts: Loshchilov and Hutter 2017 (arXiv:1608.03983).
    """

    def __init__(self, config: OptimConfig, length: RunLength) -> None:
        if config.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule={config.schedule!r}: choose from {', '.join(SCHEDULES)}.")
        self.config = config

        def steps(values: list[float | str], key: str) -> list[int]:
            return [
                duration(v, f"optim.{key}[{i}]", length.total_steps, length.steps_per_epoch)
                for i, v in enumerate(values)
            ]

        self.warmup = duration(config.warmup, "optim.warmup", length.total_steps, length.steps_per_epoch)
        self.milestones = steps(config.milestones, "milestones")
        self.begins = [0, *steps(config.restarts, "restarts"), max(length.total_steps, 1)]
        if self.begins != sorted(self.begins):
            raise UserError(
                f"optim.restarts={config.restarts} are steps {self.begins[1:-1]} of {length.total_steps}: "
                "give them in ascending order, within the run."
            )

    def __call__(self, step: int) -> float:
        config = self.config
        piece = max(bisect.bisect_right(self.begins, step), 1)
        begin, end = self.begins[piece - 1], self.begins[min(piece, len(self.begins) - 1)]
        if step - begin < self.warmup:
            return config.lr * (step - begin + 1) / self.warmup
        if config.schedule == "constant":
            return config.lr
        if config.schedule == "step":
            return config.lr * config.gamma ** sum(begin + m <= step for m in self.milestones)
        done = min((step - begin - self.warmup) / max(end - begin - self.warmup, 1), 1.0)
        return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
