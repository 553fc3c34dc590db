"""What a student learns from. A teacher answers a batch; it has no gradients, no optimizer and stays in eval mode.

Each rank asks it about its own samples only, with the very inputs, augmented, that the student saw; no logits cross
ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dist_compress.calling import call, call_headless

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(Protocol):
    model: nn.Module | None  # None: there is no network to look into

    def __call__(self, batch: dict[str, Any], headless: bool = False) -> Any:
        """What it says of a batch: an output of the model (`headless`: with logits that are not made), or a
        `stored.Stored`. Local."""
        ...

    def note(self) -> str:
        """A line for the user."""
        ...


class OnlineTeacher:
    """A replica on every rank: `model` is changed to `precision`, eval mode and no gradients."""

    def __init__(self, model: nn.Module, precision: str = "fp32") -> None:
        self.dtype, self.precision = DTYPES[precision], precision
        self.model: nn.Module | None = model.to(self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], headless: bool = False) -> Any:
        assert self.model is not None and not self.model.training
        inputs = tree_map(self.cast, batch["inputs"])
        return call_headless(self.model, inputs, "task.fused_head") if headless else call(self.model, inputs)

    def cast(self, leaf: Any) -> Any:
        """Floating point numbers in the precision of the teacher."""
        return leaf.to(self.dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    def note(self) -> str:
        assert self.model is not None
        size = sum(p.numel() for p in self.model.parameters())
        return f"teacher: {type(self.model).__name__} with {size:,} parameters in {self.precision}, on every rank"
