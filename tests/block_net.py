"""A small transformer of blocks, for tests of what is done to blocks: by recomputing, compiling or sharding them."""

from __future__ import annotations

import torch
from small_nets import FusedAttention
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), FusedAttention(width, 4)
        self.norm2, self.up, self.act, self.down = (
            nn.LayerNorm(width), nn.Linear(width, 40), nn.ReLU(), nn.Linear(40, width)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.dropout(self.attention(self.norm1(x)), 0.1, self.training)
        return x + self.down(self.act(self.up(self.norm2(x))))


class Net(nn.Module):
    """For images of 8 x 8 pixels, whose rows are the tokens."""

    def __init__(self, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(24, width), nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.movedim(1, 2).flatten(2))  # [n, rows, channels * columns]
        return self.head(self.norm(self.blocks(x)).mean(1))
