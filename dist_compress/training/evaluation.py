"""Each sample of a split exactly once, at any number of ranks, with equal bits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.training.data.split import Split, prefetch
from dist_compress.training.task import caller


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Forward passes in bfloat16 where that is safe (`train.precision=bf16`). Local."""
    return torch.autocast(comm.device().type, dtype=torch.bfloat16, enabled=precision == "bf16")


def as_row(sums: dict[str, Any]) -> torch.Tensor:
    """float64 [len(sums)] on the device of the run, from scalars of any kind. Local."""
    values = [torch.as_tensor(v, dtype=torch.float64, device=comm.device()) for v in sums.values()]
    return torch.stack(values).detach()


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, task: Any, batch_size: int, precision: str) -> dict[str, float]:
    """{"loss": mean, and the task's metrics} over the whole split, in eval mode. Collective; the same
    everywhere. What a task derives from the means of the whole (`finish`) is among them.

    Batch j goes to rank j mod N; the last one may be smaller. A rank without a batch in the last round runs a
    dummy.
    """
    was_training = model.training
    model.eval()
    num_batches = -(-split.num_samples // batch_size)
    rows: list[torch.Tensor] = []
    names: list[str] = []
    for round in range(-(-num_batches // comm.world_size())):
        j = (round * comm.world_size() + comm.rank()) % num_batches  # a dummy repeats an early batch: ignored
        ids = torch.arange(j * batch_size, min((j + 1) * batch_size, split.num_samples))
        prefetch(split, ids + comm.world_size() * batch_size, None)
        batch = split.batch(ids, None)
        with autocast(precision):
            output = caller(task)(model, batch["inputs"])
        sums = {"loss": task.loss(output, batch), **task.metrics(output, batch)}
        names = list(sums)
        rows.append(as_row({**sums, "count": task.count(batch)}))
    model.train(was_training)
    total = comm.ordered_sum(torch.stack(rows), num_batches)
    means = dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True))
    return getattr(task, "finish", dict)(means)
