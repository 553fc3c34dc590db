"""Modules with python code of their own, as people write them: sizes come from attributes or from shapes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = (F.relu, F.gelu, torch.sigmoid, F.silu, torch.tanh, F.hardswish, F.leaky_relu, torch.relu_, F.softplus)
MOST_TOKENS = 16  # that rotary positions are made for


class Scale(nn.Module):
    """Layer scale: one factor per channel (the last dim, or dim 1 of an image), and a shift when asked for."""

    def __init__(self, shape: tuple[int, ...], shift: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)
        self.beta = nn.Parameter(torch.randn(shape)) if shift else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.gamma
        return x if self.beta is None else x + self.beta


class ChannelsLastNorm(nn.Module):
    """LayerNorm over the channels of an image, with the permutes around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, hidden: int, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Shuffle(nn.Module):
    """Channel shuffle by view and transpose."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class GroupMix(nn.Module):
    """Splits the last dim into groups and sums, averages or normalises over one half of the split."""

    def __init__(self, groups: int, inner: int, how: str) -> None:
        super().__init__()
        self.groups, self.inner, self.how = groups, inner, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.unflatten(-1, (self.groups, self.inner))
        if self.how == "sum":
            return y.sum(-2)
        if self.how == "mean":
            return y.mean(-1)
        if self.how == "softmax":
            return y.softmax(-1).flatten(-2)
        return y.transpose(-1, -2).flatten(-2)


class Mlp(nn.Module):
    """down(f(up(x))), or a gated one with separate or fused projections."""

    def __init__(self, dim: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(dim, hidden * (2 if kind == "fused" else 1), bias=bias)
        self.gate = nn.Linear(dim, hidden, bias=bias) if kind == "gated" else None
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.gate is not None:
            y = F.silu(self.gate(x)) * y
        elif self.kind == "fused":
            a, b = y.chunk(2, -1)
            y = F.gelu(a) * b
        else:
            y = F.gelu(y)
        return self.down(y)


class Attention(nn.Module):
    """Self attention: fused or separate projections, grouped keys and values, rotary positions, sdpa or by hand."""

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, fused: bool, rotary: bool, sdpa: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.sdpa = num_heads, num_kv_heads, head_dim, sdpa
        if fused:
            self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        else:
            self.qkv = None
            self.q = nn.Linear(dim, num_heads * head_dim)
            self.k, self.v = (nn.Linear(dim, num_kv_heads * head_dim, bias=name == "v") for name in "kv")
        self.proj = nn.Linear(num_heads * head_dim, dim)
        self.scale = head_dim**-0.5
        angles = torch.arange(float(MOST_TOKENS))[:, None] / 10.0 ** torch.arange(0, head_dim // 2)
        self.register_buffer("angles", torch.cat([angles, angles], -1) if rotary else None)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        if self.angles is None:
            return x
        angles = self.angles[: x.shape[-2]]
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(x).view(b, n, -1, self.head_dim).transpose(1, 2)
            k = self.k(x).view(b, n, -1, self.head_dim).transpose(1, 2)
            v = self.v(x).view(b, n, -1, self.head_dim).transpose(1, 2)
        q, k = self.rotate(q), self.rotate(k)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])
        else:
            repeats = q.shape[1] // k.shape[1]
            if repeats > 1:
                k, v = (t[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (k, v))
            y = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class OwnNorm(nn.Module):
    """RMS norm as language models write it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(dim) + 0.5), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention, whose projections are one parameter."""

    def __init__(self, dim: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads, bias=bias, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """The outputs of a GRU or an LSTM, without its last state."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


class TokenMix(nn.Module):
    """A linear layer over the tokens."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tokens, hidden), nn.Linear(hidden, tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Positions(nn.Module):
    """A class token in front and a learned embedding of each place."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.table = nn.Parameter(torch.randn(1, tokens + 3, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.table[:, : x.shape[1] + 1]


class Pick(nn.Module):
    """Channels through a constant index that a buffer holds."""

    def __init__(self, index: list[int], dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", torch.tensor(index))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(self.dim, self.index)


class Literal(nn.Module):
    """Code that holds a size of its own: a slice by numbers along `dim`."""

    def __init__(self, start: int, stop: int, dim: int) -> None:
        super().__init__()
        self.where = (slice(None),) * dim + (slice(start, stop),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.where]
