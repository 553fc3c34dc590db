"""Distributed compression for PyTorch: prune, shrink and verify in one training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from torch.fx import GraphModule

__version__ = "0.1.0"
__all__ = ["concrete_trace", "load"]


def load(folder: str | Path, trust: bool = False) -> nn.Module:
    """The model a run left in `folder`, small, with its weights, in evaluation mode on the CPU. No pickle.

    `trust`: whether code that the folder names may be called, as a model of one's own (`model._target_`) needs.
    """
    from dist_compress.export.safetensors import load

    return load(folder, trust)


def concrete_trace(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> GraphModule:
    """The program that `model` runs on this input, recorded: see `dist_compress.tracing.recorder`."""
    from dist_compress.tracing.recorder import concrete_trace

    return concrete_trace(model, args, kwargs)
