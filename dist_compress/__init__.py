"""Distributed compression for PyTorch: prune, shrink and verify in one training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn
    from torch.fx import GraphModule

    from dist_compress.one_shot import PruneReport
    from dist_compress.own_loop import Attached

__version__ = "0.1.0"
__all__ = ["attach", "concrete_trace", "load", "prune"]


def load(folder: str | Path, trust: bool = False, model: nn.Module | None = None) -> nn.Module:
    """The model a run left in `folder`, small, with its weights, in evaluation mode on the CPU. No pickle.

    `trust`: whether code that the folder names may be called, as a model of one's own (`model._target_`) needs.
    `model`: the dense architecture, made smaller in place; what a loop of one's own left needs it.
    """
    from dist_compress.export.safetensors import load

    return load(folder, trust, model)


def attach(*args: Any, **kwargs: Any) -> Attached:
    """Compression inside a training loop of one's own: see `dist_compress.own_loop.attach`."""
    from dist_compress.own_loop import attach

    return attach(*args, **kwargs)


def concrete_trace(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> GraphModule:
    """The program that `model` runs on this input, recorded: see `dist_compress.tracing.recorder`."""
    from dist_compress.tracing.recorder import concrete_trace

    return concrete_trace(model, args, kwargs)


def prune(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    config_list: Sequence[Mapping[str, Any]] = (),
    method: str = "l1_norm",
    **settings: Any,
) -> tuple[nn.Module, PruneReport]:
    """A smaller copy of `model`, pruned by `config_list` and verified, and a report: see `dist_compress.one_shot`."""
    from dist_compress.one_shot import prune

    return prune(model, args, kwargs, config_list, method, **settings)
