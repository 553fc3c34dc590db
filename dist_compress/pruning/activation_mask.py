"""A mask in the data flow: a buffer of the module, and a hook that applies it to one of its activations.

The buffer is not persistent in training (the pruner's state has the masks, so the model's state_dict keeps its keys).
What is left of the masks in a delivered model is saved with it (`shipped`) and put back when it is loaded (`restore`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_compress import method
from dist_compress.config import merge
from dist_compress.errors import UserError
from dist_compress.sites import installed, replace

PREFIX = "pruning"  # of the buffer: pruning_output_0


class Mask:
    """Applies the mask that a module holds to what goes by. (It knows the module, so that a deep copy of the model acts
    with the masks of the copy.)"""

    def __init__(self, module: nn.Module, where: str, site: str, how: str, options: Mapping[str, Any]) -> None:
        self.module, self.where, self.site, self.how = module, where, site, how
        self.options = options_of(how, options, f"{where}.{site}")
        self.given = dict(options)
        self.buffer = PREFIX + site.replace(".", "_")
        self.apply = rule(how, f"{where}.{site}").apply

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        mask = getattr(self.module, self.buffer)
        try:
            return self.apply(x, mask.to(x.dtype), self.options)
        except RuntimeError as error:
            if mask.dim() == x.dim():
                raise UserError(
                    f"{self.where}.{self.site}: the mask has shape {tuple(mask.shape)}, this call {tuple(x.shape)}. "
                    "A granularity of blocks or elements needs activations of one size; use per_channel."
                ) from error
            raise


def install(
    model: nn.Module, where: str, site: str, how: str, options: Mapping[str, Any], mask: torch.Tensor, persistent: bool
) -> RemovableHandle:
    """Let `mask` (bool, broadcastable to the activation, True = keep) act on an activation of module `where`. Local."""
    module = model.get_submodule(where)
    act = Mask(module, where, site, how, options)
    module.register_buffer(act.buffer, mask.float(), persistent=persistent)
    return replace(module, site, act, where)


def shipped(model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The masks that act on activations of `model`: what `restore` needs to put them back, as JSON, and the tensors by
    name."""
    described, tensors = [], {}
    for where, _, act in installed(model):
        if isinstance(act, Mask):
            mask = getattr(act.module, act.buffer)
            described.append(
                {"module": where, "site": act.site, "apply_method": act.how, "apply_options": act.given,
                 "shape": list(mask.shape)}
            )  # fmt: skip
            tensors[f"{where}.{act.buffer}"] = mask
    return described, tensors


def restore(model: nn.Module, described: list[dict[str, Any]]) -> None:
    """Put masks back, all of ones: their values come with the weights, as persistent buffers."""
    for item in described:
        mask = torch.ones(item["shape"], dtype=torch.bool)
        install(model, item["module"], item["site"], item["apply_method"], item["apply_options"], mask, True)


def rule(how: str, key: str) -> ModuleType:
    """The file of an apply_method. Raises UserError naming `key` and the choices."""
    module = method.load("pruning", f"{key}.apply_method", how, "apply_methods")
    lacks = [name for name in ("Options", "apply") if not hasattr(module, name)]
    if lacks:
        raise UserError(f"{key}.apply_method={how!r}: {module.__name__} does not define `{lacks[0]}`. Add it.")
    return module


def options_of(how: str, given: Mapping[str, Any], key: str) -> Any:
    """The checked options of an apply_method. Raises UserError."""
    return merge(rule(how, key).Options, given, f"{key}.apply_options")
