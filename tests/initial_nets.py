"""Models that hold tensors in one more place than parameters and buffers, or look at values."""

from __future__ import annotations

import torch
from torch import nn


class Tied(nn.Module):
    """With shared weights, a recurrent layer, buffers of all kinds, a tensor as an attribute, and a frozen layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.embed, self.core = nn.Linear(64, 16), nn.LSTM(16, 16, batch_first=True)
        self.one, self.two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.two.weight = self.one.weight
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, num_classes)
        self.embed.requires_grad_(False)
        self.register_buffer("drawn", torch.rand(16), persistent=False)
        self.shift = torch.rand(16) - 0.5  # neither
        self.same = self.drawn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.core(self.embed(x.mean(1).flatten(1))[:, None])
        return self.head(self.norm(self.two(self.one(hidden[:, 0]).relu()) * self.drawn + self.shift))


class Reads(Tied):
    """Looks at values when it is built."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.scale = 1.0 + self.head.weight.abs().max().item()


class Keeps(Tied):
    """Holds a tensor where nobody finds it."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.tables = [torch.rand(16)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.tables[0].mean())


class Looks(Tied):
    """Looks at what its weights have made."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if float(y.detach().abs().max()) > 1e-6 else y + 1e-6
