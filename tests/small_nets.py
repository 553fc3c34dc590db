"""Small models for the tests of structures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Layers by name and a forward from a function of the net and its inputs; short, not what one would ship."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def image(channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(1, channels, size, size)


def tokens(width: int) -> Callable[[int], torch.Tensor]:
    """Inputs [batch, tokens, width], whose number of tokens grows with the batch."""
    return lambda batch: torch.randn(batch, 4 + batch, width)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all weights."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}


def both(name: str, index: list[int]) -> dict[str, list[int]]:
    """Rows of a weight and its bias."""
    return {f"{name}.weight": index, f"{name}.bias": index}


def block(start: int, size: int, *offsets: int) -> list[int]:
    """`size` indices from `start`, once for each offset."""
    return [offset + start + i for offset in offsets or (0,) for i in range(size)]


class FusedAttention(nn.Module):
    """qkv in one layer; by sdpa or by hand."""

    def __init__(self, dim: int = 16, num_heads: int = 4, by_hand: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.by_hand = num_heads, dim // num_heads, by_hand
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, num_tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            y = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(batch, num_tokens, -1))


class GroupedAttention(nn.Module):
    """Each head of k and v serves `num_heads / num_kv_heads` heads of q. Heads are counted by their size."""

    def __init__(self, dim: int = 16, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 4) -> None:
        super().__init__()
        self.head_dim, self.repeats = head_dim, num_heads // num_kv_heads
        self.q = nn.Linear(dim, num_heads * head_dim)
        self.k, self.v = (nn.Linear(dim, num_kv_heads * head_dim) for _ in range(2))
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, self.repeats, -1, -1).flatten(1, 2) for t in (k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
