"""World-size independent fingerprints of tensors: one number to compare ranks, runs and machines by."""

from __future__ import annotations

import torch
from torch import nn

from dist_compress.hashing import mix, splitmix64


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits over the bits of all parameters and buffers in model order. Local.

    Equal exactly when every tensor is equal bit for bit: the sum of hash(position, bits) modulo 2^64.
    """
    total = torch.zeros((), dtype=torch.int64)
    start = 0
    for tensor in model.state_dict().values():
        raw = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).to(torch.int64)
        position = torch.arange(start, start + raw.numel())
        total += splitmix64(mix(position, raw)).sum()  # wraps around, as it must
        start += raw.numel()
    return f"{int(total) & (2**64 - 1):016x}"
