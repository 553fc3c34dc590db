"""Threads and kernels of this process: what `train.exact` needs beside ordered sums."""

from __future__ import annotations

import os
import random

import torch

from dist_compress.config import TrainConfig
from dist_compress.errors import UserError
from dist_compress.hashing import seed_of

_RANDOM = 0x54E  # purpose of the seed


def set_up(config: TrainConfig) -> None:
    """Pin threads and choose kernels. Local, the same on every rank; call it before the first forward.

    The number of threads changes the order of sums inside a kernel, and torchrun pins it only above one rank.
    """
    if config.exact and config.sync_batchnorm:
        raise UserError(
            "train.exact=true with train.sync_batchnorm=true: SyncBatchNorm normalises over a round of all ranks, so "
            "its result depends on their number. Set one of the two to false."
        )
    if config.precision not in ("fp32", "bf16"):
        raise UserError(f"train.precision={config.precision!r}: choose fp32 or bf16.")
    threads = config.num_threads or (1 if config.exact else None)
    if threads is not None:
        torch.set_num_threads(threads)
    if config.exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def seed_for(seed: int, step: int, micro: int) -> None:
    """Seed what a forward pass may draw from (dropout, stochastic depth) by the micro-batch, not by the rank.
    Local."""
    value = seed_of(seed, _RANDOM, step, micro)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
    random.seed(value)
