"""BatchNorm's running statistics, the same at any number of ranks.

BatchNorm (Ioffe and Szegedy 2015) normalises each micro-batch by itself. Its running statistics are recorded
per micro-batch, summed in micro-batch order over the ranks and committed once per optimizer step:

    running = (1 - momentum) * running + momentum * mean over the micro-batches

The record costs no extra pass: with momentum 1 the layer's own buffers hold the statistics of the last
forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.recompute import recomputing


class BatchNormTracker:
    """Takes over the momentum and the running buffers of every norm of `model` that tracks them; `remove`
    undoes it."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: list[Any] = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        self.momenta = [m.momentum for m in self.norms]
        self.widths = [2 * m.num_features + 1 for m in self.norms]  # mean, variance, number of calls
        self.size = sum(self.widths)
        self.recording = False
        self.hooks = [m.register_forward_hook(self._record) for m in self.norms]
        self._records: dict[nn.Module, torch.Tensor] = {}
        self._before: list[list[torch.Tensor]] = []

    def begin_step(self) -> None:
        """Remember the buffers, which the forward passes of this step will overwrite. Local."""
        self._before = [[b.clone() for b in self._buffers(m)] for m in self.norms]
        for norm in self.norms:
            norm.momentum = 1.0

    def begin_micro(self, live: bool) -> torch.Tensor:
        """float64 [size], zero, which the next forward fills unless the micro-batch is missing. Local."""
        device = self.norms[0].running_mean.device if self.norms else comm.device()
        row = torch.zeros(self.size, dtype=torch.float64, device=device)
        self.recording = live
        self._records = dict(zip(self.norms, row.split(self.widths), strict=True))
        return row

    @torch.no_grad()
    def commit(self, total: torch.Tensor) -> None:
        """Update the buffers once from the sum of all rows, float64 [size]. Local, the same on every rank.

        A norm that no micro-batch called, or that is in eval mode, keeps its statistics.
        """
        parts = total.split(self.widths)
        for norm, momentum, before, part in zip(self.norms, self.momenta, self._before, parts, strict=True):
            norm.momentum = momentum
            for buffer, old in zip(self._buffers(norm), before, strict=True):
                buffer.copy_(old)
            calls = part[-1]
            called = calls > 0  # stays a tensor: no waiting for the device
            norm.num_batches_tracked += called
            weight = 1.0 / norm.num_batches_tracked.clamp(min=1) if momentum is None else momentum
            for buffer, value in zip((norm.running_mean, norm.running_var), part[:-1].chunk(2), strict=True):
                mean = (value / calls.clamp(min=1)).to(buffer.dtype)
                buffer.copy_(torch.where(called, buffer + weight * (mean - buffer), buffer))
        self.recording = False

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _record(self, norm: Any, args: Any, output: Any) -> None:
        if self.recording and norm.training and not recomputing():
            record, width = self._records[norm], norm.num_features
            record[:width] += norm.running_mean
            record[width:-1] += norm.running_var
            record[-1] += 1

    @staticmethod
    def _buffers(norm: Any) -> list[torch.Tensor]:
        return [norm.running_mean, norm.running_var, norm.num_batches_tracked]


def use_sync_batchnorm(model: nn.Module) -> nn.Module:
    """`model` with SyncBatchNorm in place of BatchNorm (`train.sync_batchnorm`). Before methods attach.
    Local.

    Normalises each round over all ranks, so the result depends on their number. Raises UserError on a CPU,
    where torch has none, and for subclasses of BatchNorm whose own behaviour would be lost.
    """
    if comm.device().type != "cuda":
        raise UserError("train.sync_batchnorm=true: SyncBatchNorm runs on GPUs only. Set it to false on a CPU.")
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for name, module in model.named_modules():
        if isinstance(module, plain) and type(module) not in plain:
            raise UserError(
                f"train.sync_batchnorm=true: {name!r} is a {type(module).__name__}, which does more than BatchNorm and "
                "cannot be converted. Set train.sync_batchnorm=false."
            )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
