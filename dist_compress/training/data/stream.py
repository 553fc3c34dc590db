"""Which samples make a micro-batch: a pure function of the position, so that a run resumes by its step alone.

The training stream is epoch after epoch, each a permutation of its own; step s takes samples [s * G, (s + 1)
* G) and micro-batch j the j-th part of them. Nothing is dropped or repeated at the end of an epoch, and
nothing depends on the number of ranks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from dist_compress import comm
from dist_compress.hashing import seed_of
from dist_compress.training.data.split import Split, prefetch

_ORDER = 0x04D  # purpose of the seed


class Stream:
    def __init__(self, num_samples: int, seed: int, global_batch_size: int, micro_batch_size: int) -> None:
        self.num_samples, self.seed = num_samples, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self._order = lru_cache(maxsize=2)(self._permutation)

    def micro(self, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [m] sample ids and int64 [m] epochs of micro-batch `micro` of `step`. Local, the same on
        every rank."""
        first = step * self.global_batch_size + micro * self.micro_batch_size
        positions = torch.arange(first, first + self.micro_batch_size)
        epochs, places = positions // self.num_samples, positions % self.num_samples
        ids = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            ids[epochs == epoch] = self._order(epoch)[places[epochs == epoch]]
        return ids, epochs

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, _ORDER, epoch))
        return torch.randperm(self.num_samples, generator=generator)


class Feed:
    """This rank's batches of the training stream, decoded one ahead where the split can."""

    def __init__(self, split: Split, stream: Stream, num_micro: int) -> None:
        self.split, self.stream, self.num_micro = split, stream, num_micro

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """Micro-batch `micro` of `step`; for one that does not exist, this rank's first of the step, not "live".
        Local."""
        ahead = micro + comm.world_size()
        following = (step, ahead) if ahead < self.num_micro else (step + 1, comm.rank())
        prefetch(self.split, *self.stream.micro(*following))
        live = micro < self.num_micro
        return {**self.split.batch(*self.stream.micro(step, micro if live else comm.rank())), "live": live}

    def global_count(self, task: Any, step: int) -> int:
        """What the losses of a step are divided by: summed over the ranks where it is not a matter of course.

        Collective unless the task says that it counts samples (`fixed_count`), the same on every rank.
        """
        if getattr(task, "fixed_count", False):
            return self.stream.global_batch_size
        own = range(comm.rank(), self.num_micro, comm.world_size())
        counted = sum(int(task.count(self.batch(step, micro))) for micro in own)
        return max(int(comm.all_reduce(torch.tensor(counted, device=comm.device()))), 1)  # 1: nothing counts, all is 0
