"""World-size independent fingerprints of tensors: one number to compare ranks, runs and machines by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from dist_compress.hashing import mix, splitmix64

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_fingerprints(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """16 hex digits for each tensor: the sum of hash(position, bits) modulo 2^64. Local.

    Equal for tensors that are equal bit for bit, whatever their memory format or device.
    """
    marks = {}
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().flatten()
        words = raw.view(_WORDS[raw.element_size()] if raw.dtype != torch.bool else torch.uint8).to(torch.int64)
        total = splitmix64(mix(torch.arange(len(words), device=words.device), words)).sum()  # wraps around, as it must
        marks[name] = _hex(int(total))
    return marks


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits over the names and bits of all parameters and buffers, in any order. Local."""
    return fingerprint_of(tensor_fingerprints(model.state_dict()))


def fingerprint_of(marks: Mapping[str, str]) -> str:
    """16 hex digits over the names and fingerprints of tensors, in any order. Local."""
    said = "\n".join(f"{name} {mark}" for name, mark in sorted(marks.items()))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _hex(value: int) -> str:
    return f"{value & (2**64 - 1):016x}"
