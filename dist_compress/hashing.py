"""Random numbers as pure functions of what they are for: no generator state to keep, the same on any rank.

splitmix64 (Steele, Lea and Flood 2014), on int64 tensors, where multiplication wraps around as it must.
"""

from __future__ import annotations

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right; `>>` of int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """int64 of any shape -> well mixed int64 of that shape."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def mix(*values: torch.Tensor | int) -> torch.Tensor:
    """Hash several int64 values (broadcast against each other) to one. Order matters."""
    hashed = torch.zeros((), dtype=torch.int64)
    for value in values:
        value = torch.as_tensor(value, dtype=torch.int64)
        hashed = splitmix64(hashed.to(value.device) ^ value)
    return hashed


def seed_of(*values: int) -> int:
    """A non-negative seed for torch.manual_seed."""
    return int(mix(*values)) & ((1 << 63) - 1)


def below(hashed: torch.Tensor, purpose: int, bound: int) -> torch.Tensor:
    """int64 in [0, bound), one draw for each `purpose` of the same hash."""
    return _shift(splitmix64(hashed ^ purpose), 1) % bound


def uniform(hashed: torch.Tensor, purpose: int) -> torch.Tensor:
    """float64 in [0, 1)."""
    return _shift(splitmix64(hashed ^ purpose), 11).double() * 2.0**-53
