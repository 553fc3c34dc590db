"""Data parallel: every rank holds the whole model.

Fast: torch's DistributedDataParallel, its buckets summed once a step, in the last round. The float32 sum's
bits depend on the number of ranks. Exact (`train.exact`): no hooks; the float32 gradient of every micro-batch
is folded into a float64 sum in micro-batch order and rounded once, with equal bits at any number of ranks.

Either way a parameter that no micro-batch of the step reached has no gradient, so that neither weight decay nor
momentum moves it, as on one process without any of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_compress import comm
from dist_compress.backends.backend import Backend, Source
from dist_compress.backends.ordered import OrderedGradients


@dataclass
class Options:
    """None."""


class Ddp(Backend):
    def wrap(self, model: nn.Module, source: Source | None = None, whole: Collection[str] = ()) -> nn.Module:
        super().wrap(model, source, whole)
        self.ddp: DistributedDataParallel | None = None
        self.ordered = OrderedGradients([p for p in model.parameters() if p.requires_grad], self.num_micro)
        spread(model)
        if self.exact or not comm.is_initialized():
            return model
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # there are none: fine
        self.ddp = DistributedDataParallel(model, init_sync=False, find_unused_parameters=True)
        # Buffers are ours to keep equal (training/batchnorm.py): DDP's broadcast would overwrite local records.
        self.ddp.broadcast_buffers = False  # its argument's name differs between versions of torch
        self.ddp.register_comm_hook(None, comm.sum_hook)
        return self.ddp

    def sync_context(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last or self.ddp is None else self.ddp.no_sync()

    def backward(self, loss: torch.Tensor, round: int, last: bool) -> None:
        loss.backward()
        if self.exact:
            self.ordered.take(round)

    def finish_gradients(self) -> None:
        if self.exact:
            self.ordered.finish()

    def release(self) -> None:
        super().release()
        self.ddp = None


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers. Collective."""
    for tensor in [*model.parameters(), *model.buffers()]:
        comm.broadcast(tensor)
