"""A net without batch statistics: what it computes depends on no other sample, so on no backend."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """For images of 8 x 8 pixels and any number of channels."""

    def __init__(self, num_classes: int = 10, width: int = 24, hidden: int = 40, depth: int = 3) -> None:
        super().__init__()
        self.stem, self.blocks = nn.LazyLinear(width), nn.Sequential(*(Block(width, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        self.stem(torch.zeros(1, 3 * 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.stem(x.flatten(1)))))
