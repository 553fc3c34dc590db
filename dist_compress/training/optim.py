"""Any optimizer of torch.optim by its name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_compress.config import OptimConfig
from dist_compress.errors import UserError
from dist_compress.moments import Names

# Weights are masked, sliced and (later) sharded element by element, and the state must follow.
REFUSED = {
    "LBFGS": "its history is over whole parameter vectors",
    "Muon": "its update orthogonalises whole matrices",
    "Adafactor": "its second moment is factored over rows and columns",
}


def build(config: OptimConfig, names: Names, undecayed: Collection[str] = ()) -> torch.optim.Optimizer:
    """An optimizer of these parameters, without weight decay on those named `undecayed`. Raises UserError for an
    unknown or refused name and for arguments the optimizer does not take. Local."""
    optimizers = {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if config.name in REFUSED:
        raise UserError(
            f"optim.name={config.name!r} cannot be used: {REFUSED[config.name]}, so its state is not elementwise and "
            "cannot follow masks and slices. Choose for example SGD or AdamW."
        )
    if config.name not in optimizers:
        choices = ", ".join(sorted(optimizers.keys() - REFUSED.keys()))
        raise UserError(f"optim.name={config.name!r}: no such optimizer. Available: {choices}.")
    accepted = list(inspect.signature(optimizers[config.name]).parameters)[1:]
    if unknown := sorted(config.kwargs.keys() - set(accepted) | config.kwargs.keys() & {"lr", "weight_decay"}):
        allowed = [name for name in accepted if name not in ("lr", "weight_decay")]
        raise UserError(f"optim.kwargs.{unknown[0]}: {config.name} accepts {', '.join(allowed)} there.")
    kwargs = {"lr": config.lr, **config.kwargs}
    if "weight_decay" in accepted:
        kwargs["weight_decay"] = config.weight_decay
    elif config.weight_decay:
        raise UserError(f"optim.weight_decay={config.weight_decay}: {config.name} has none. Set it to 0.")
    groups: dict[Any, dict[str, Any]] = {}
    for parameter, name in names.items():  # sharded and whole ones apart: an optimizer steps a group as one
        decayed = not config.weight_decay or name not in undecayed
        group = groups.setdefault((isinstance(parameter, DTensor), decayed), {"params": []})
        group["params"].append(parameter)
        if not decayed:
            group["weight_decay"] = 0.0
    try:
        return optimizers[config.name](list(groups.values()), **kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(f"optim ({config.name}, {kwargs}): {error}") from None


def trained(model: nn.Module) -> Names:
    """{parameter: its first name} of the parameters that are trained, in the model's order. Local."""
    return {p: name for name, p in model.named_parameters() if p.requires_grad}


def check_loss(loss: float, step: int, config: OptimConfig) -> None:
    """Raise UserError unless the loss is finite. Local; the loss is the same on every rank."""
    if not math.isfinite(loss):
        raise _diverged(f"The training loss is {loss}", step, config)


def check_weights(name: str, step: int, config: OptimConfig) -> None:
    """Raise UserError for the weight `name`, if any, that is not finite. Local."""
    if name:
        raise _diverged(f"{name} is not finite", step, config)


def _diverged(what: str, step: int, config: OptimConfig) -> UserError:
    return UserError(
        f"{what} at step {step}. Lower optim.lr={config.lr}, add a warm-up "
        "(optim.warmup=0.1) or set train.clip_norm=1.0. Checkpoints written before are untouched."
    )
