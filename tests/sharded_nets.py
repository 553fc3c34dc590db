"""Models whose parameters lie in parts on the ranks: FSDP2 for real, and flat partitions as ZeRO-3 has them."""

from __future__ import annotations

import torch
from torch import nn

from dist_compress import comm
from dist_compress.layout import Layout, Run


def dealt(num: int, pieces: int, rank: int, size: int) -> list[Run]:
    """Runs of `num` elements cut unevenly into `pieces` (some empty), dealt to the ranks; the last rank has most."""
    edges = [num * i * i // pieces**2 for i in range(pieces + 1)]
    owner = [min((i * i + i // 3) % (size + 1), size - 1) for i in range(pieces)]
    return [(a, b - a) for a, b, r in zip(edges, edges[1:], owner, strict=False) if r == rank]


class Flat(Layout):
    """Every parameter is one flat tensor a rank, of runs that know nothing of rows."""

    def __init__(self, model: nn.Module, pieces: int = 13) -> None:
        """Takes what other ranks hold out of the model: its parameters become their local parts, shape lost."""
        super().__init__(model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.pieces = pieces
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            own = [flat[first : first + length] for first, length in self.runs(name, comm.rank())]
            parameter.data = torch.cat([flat[:0], *own])

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name]

    def runs(self, name: str, rank: int) -> list[Run]:
        return dealt(self.shapes[name].numel(), self.pieces, rank, comm.world_size())
