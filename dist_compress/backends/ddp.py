"""Data parallel: every rank holds the whole model.

Fast: torch's DistributedDataParallel, its buckets summed once a step, in the last round. The float32 sum's
bits depend on the number of ranks. Exact (`train.exact`): no hooks; the float32 gradient of every micro-batch
is folded into a float64 sum in micro-batch order and rounded once, with equal bits at any number of ranks.

Either way a parameter that no micro-batch of the step reached has no gradient, so that neither weight decay nor
momentum moves it, as on one process without any of this.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_compress import comm
from dist_compress.backends.backend import Backend, Source
from dist_compress.layout import Layout


@dataclass
class Options:
    """None."""


class Ddp(Backend):
    def wrap(self, model: nn.Module, source: Source | None = None) -> nn.Module:
        self.model, self.layout = model, Layout(model)
        self.ddp: DistributedDataParallel | None = None
        self.total: comm.OrderedSum | None = None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
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
        if not self.exact:
            return
        reached = torch.tensor([p.grad is not None for p in self.parameters], device=loss.device)
        row = torch.cat([*(self._take_grad(p) for p in self.parameters), reached.float()])
        if round == 0:
            self.total = comm.OrderedSum(len(row), row.device)
        assert self.total is not None
        num_live = min(comm.world_size(), self.num_micro - round * comm.world_size())
        self.total.add(row[None], num_live)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        if not self.exact:
            return
        assert self.total is not None
        *total, reached = self.total.total().split([*(p.numel() for p in self.parameters), len(self.parameters)])
        for parameter, grad, count in zip(self.parameters, total, reached.tolist(), strict=True):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype) if count else None
        self.total = None

    def release(self) -> None:
        self.ddp = None

    @staticmethod
    def _take_grad(parameter: nn.Parameter) -> torch.Tensor:
        """The flat float32 gradient of this micro-batch, zeros where it did not reach the parameter."""
        grad, parameter.grad = parameter.grad, None
        return torch.zeros_like(parameter).flatten().float() if grad is None else grad.flatten().float()


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers. Collective."""
    for tensor in [*model.parameters(), *model.buffers()]:
        comm.broadcast(tensor)
