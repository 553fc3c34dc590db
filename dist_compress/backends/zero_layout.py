"""Flat partitions as ZeRO makes them: who holds which elements, and the way to rows and back for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dist_compress import comm
from dist_compress.exchange import Exchange, Span
from dist_compress.layout import Layout, Run, local_part

Tensors = Mapping[str, torch.Tensor]


class FlatLayout(Layout):
    """Parameters of which every rank holds one run of the flattened elements, maybe an empty one."""

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, torch.Size],
        holdings: Mapping[str, list[list[Run]]],
        local: Tensors,
        publish: Callable[[], None],
    ) -> None:
        """All by the first name of a parameter. `holdings`: of the partitioned ones, the runs of every rank; `local`:
        what this rank holds, flat and live, or the whole parameter. Collective: makes a mesh of all ranks."""
        super().__init__(model)
        self._shapes, self._holdings, self._local, self._publish = shapes, holdings, local, publish
        self.grads: Tensors = {}  # of this step, live
        first = {id(p): name for name, p in model.named_parameters()}
        self._first = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._mesh: DeviceMesh = init_device_mesh(comm.device().type, (comm.world_size(),))

    def shape(self, name: str) -> torch.Size:
        return self._shapes[self._first[name]]

    def local(self, name: str) -> torch.Tensor:
        return self._local[self._first[name]]

    def grad(self, name: str) -> torch.Tensor | None:
        return self.grads.get(self._first[name])

    def runs(self, name: str, rank: int) -> Sequence[Run]:
        holdings = self._holdings.get(self._first[name])
        return [(0, self.shape(name).numel())] if holdings is None else holdings[rank]

    def publish(self) -> None:
        self._publish()

    def wrapped(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """Rows, as a DTensor has them; what is whole anyway stays whole. Collective."""
        if not self._is_cut(name):
            return local
        flat, shape = local.reshape(-1), self.shape(name)
        exchange = Exchange({name: self.holdings(name)}, [[_rows(name, shape, r)] for r in range(comm.world_size())])
        (rows,) = exchange.move(exchange.pick(lambda _: flat), lambda _: flat)
        return self._as_rows(name, rows)

    def unwrapped(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Collective."""
        if not self._is_cut(name):
            return tensor
        flat, size = local_part(tensor).reshape(-1), comm.world_size()
        spans = [_rows(name, self.shape(name), rank) for rank in range(size)]
        rows = [[(s.start, s.end - s.start)] if s.end > s.start else [] for s in spans]
        wants = [[Span(name, first, first + n) for first, n in self.runs(name, rank)] for rank in range(size)]
        exchange = Exchange({name: rows}, wants)
        parts = exchange.move(exchange.pick(lambda _: flat), lambda _: flat)
        return torch.cat([flat.new_empty(0), *parts])

    def blank(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if not self._is_cut(name):
            return torch.empty(self.shape(name), dtype=dtype)
        span = _rows(name, self.shape(name), comm.rank())
        return self._as_rows(name, torch.empty(span.end - span.start, dtype=dtype, device=comm.device()))

    def _is_cut(self, name: str) -> bool:
        return self._first[name] in self._holdings

    def _as_rows(self, name: str, flat: torch.Tensor) -> DTensor:
        shape = self.shape(name)
        rows = flat.view(len(flat) // max(math.prod(shape[1:]), 1), *shape[1:])  # maybe none
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _rows(name: str, shape: torch.Size, rank: int) -> Span:
    """The elements of the rows that a DTensor sharded by rows gives to `rank`."""
    num, width = shape[0], math.prod(shape[1:])
    each = -(-num // comm.world_size())
    start = min(rank * each, num)
    return Span(name, start * width, min(start + each, num) * width)


def flat_runs(num: int, offset: int, width: int, size: int) -> list[list[Run]]:
    """The runs of `size` ranks of a parameter of `num` elements, which begins at `offset` of a tensor that is cut into
    pieces of `width`, one a rank."""
    found: list[list[Run]] = []
    for rank in range(size):
        first, end = max(rank * width - offset, 0), min((rank + 1) * width - offset, num)
        found.append([(first, end - first)] if first < end else [])
    return found
