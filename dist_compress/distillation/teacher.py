"""What a student learns from. A teacher answers a batch; it has no gradients, no optimizer and stays in eval mode.

Each rank asks it about its own samples only, with the very inputs, augmented, that the student saw; no logits cross
ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dist_compress.calling import call, call_headless, output_layer

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
        self.size = sum(p.numel() for p in model.parameters())
        self.rows = ""  # which ones of the output layer are here, in words

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], headless: bool = False) -> Any:
        assert self.model is not None and not self.model.training
        inputs = tree_map(self.cast, batch["inputs"])
        return call_headless(self.model, inputs, "task.fused_head") if headless else call(self.model, inputs)

    def keep_rows(self, rows: slice) -> None:
        """Free the other rows of the output layer, from which only hidden states are asked then. Local. Raises
        UserError."""
        assert self.model is not None
        head = output_layer(self.model, "task.fused_head")
        holders = [m for m in self.model.modules() if any(p is head.weight for p in m._parameters.values())]
        tied, whole = len(holders) > 1, len(head.weight)
        own = head.weight[rows] if tied else head.weight[rows].clone()  # a view of what the input needs whole
        head.weight = nn.Parameter(own, requires_grad=False)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias[rows].clone(), requires_grad=False)
        self.rows = f", but for its output layer: {len(own):,} of {whole:,} rows here"
        if tied:
            self.rows = "; its output layer is its input embedding and stays whole"

    def cast(self, leaf: Any) -> Any:
        """Floating point numbers in the precision of the teacher."""
        return leaf.to(self.dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    def note(self) -> str:
        assert self.model is not None
        name = type(self.model).__name__
        return f"teacher: {name} with {self.size:,} parameters in {self.precision}, on every rank{self.rows}"
