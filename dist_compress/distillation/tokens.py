"""Which tokens of a micro-batch of text count in a loss between hidden states, and how much each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_compress.calling import IGNORED


@dataclass(frozen=True)
class Tokens:
    """A loss is the sum over the valid tokens, each times the weight of its sample."""

    valid: torch.Tensor  # bool [n, tokens]
    weight: torch.Tensor  # float [n]: 1 where each token has a target, else 1 / number of valid tokens

    def of(self, x: torch.Tensor) -> bool:
        """Whether `x` is a hidden state of these tokens, [n, tokens, channels]."""
        return x.dim() == 3 and x.shape[:2] == self.valid.shape

    def each(self) -> torch.Tensor:
        """[valid tokens], the weights one by one."""
        return self.weight[:, None].expand_as(self.valid)[self.valid]


def tokens_of(batch: dict[str, Any]) -> Tokens | None:
    """None unless `batch` is text: its targets are one number a token, int64 [n, tokens] (IGNORED: does not count), or
    its inputs have an `attention_mask` [n, tokens]. Local."""
    targets, inputs = batch["targets"], batch["inputs"]
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    if targets.dim() == 2 and not targets.is_floating_point():
        valid = targets != IGNORED
        return Tokens(valid, torch.ones(len(valid), device=valid.device))
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        valid = mask.bool()
        return Tokens(valid, 1 / valid.sum(1).clamp(min=1))
    return None
