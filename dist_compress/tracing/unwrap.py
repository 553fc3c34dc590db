"""The user's own model behind the wrappers of torch."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter

from dist_compress.errors import UserError
from dist_compress.tracing.walk import modules_of, parameters_of

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DDP and DataParallel, whose names the parameters go by. Local.

    Raises UserError for what holds no whole parameters: FSDP, DTensors, lazy layers.
    """
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    modules = modules_of(model)
    sharded = {kind for kind in set(map(type, modules.values())) if _SHARDED & {cls.__name__ for cls in kind.__mro__}}
    for name, module in modules.items():
        if type(module) in sharded:
            raise UserError(
                f"Module {name or 'itself'!r} of the model is wrapped by FSDP, so no rank holds whole parameters. Make "
                "the plan on an unwrapped model that loads the full state dict, and apply it before wrapping."
            )
    for name, parameter in parameters_of(modules).items():
        if type(parameter).__name__ == "DTensor":
            raise UserError(
                f"Parameter {name!r} is a DTensor, so no rank holds all of it. Make the plan on an unwrapped model "
                "that loads the full state dict, and apply it before distributing."
            )
        if isinstance(parameter, UninitializedParameter):
            raise UserError(f"Parameter {name!r} of a lazy layer has no shape yet. Run the model once on an example.")
    return model
