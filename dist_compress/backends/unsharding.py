"""What `fully_shard` or DeepSpeed does to a module, undone in place: they have no inverse, and a shrink needs one.

They swap the class, hang hooks and attributes on modules, and put something else in the place of parameters. Hooks
and attributes of others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.distributed import _composable_state

from dist_compress import comm
from dist_compress.backends.backend import Source

FSDP = "torch.distributed.fsdp"  # where its hooks are defined
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


class Snapshot:
    """A unit before it is sharded. Everything is local but `fill`."""

    def __init__(
        self, unit: nn.Module, model: nn.Module, kept: Collection[nn.Parameter] = (), owner: str = FSDP
    ) -> None:
        """`kept`: parameters that are not sharded; `owner`: the package that shards the others."""
        self.owner, self.shapes = owner, []
        self.unit, self.classes = unit, {module: type(module) for module in unit.modules()}
        self.before = {module: set(vars(module)) for module in unit.modules()}
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # all under which a parameter is known
        inner = [p for p in unit.parameters() if hasattr(p, "placements")]  # of units inside this one
        own = set(unit.parameters()).difference(inner, kept)
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter in own:
                    self.places.setdefault(parameter, []).append((module, key))
        self.names = {parameter: names[parameter] for parameter in self.places}

    def fill(self, source: Source | None, each: Callable[[nn.Parameter], None] | None = None) -> None:
        """Make its parameters whole, contiguous and real, on the device of the run: those of the meta device from
        `source`. Collective with a `source`. `each`: what to do with every one before the next."""
        for parameter in list(self.places):
            assert not parameter.is_meta or source is not None, f"{self.names[parameter]} has no values"
            value = source(self.names[parameter]) if parameter.is_meta and source else parameter.detach()
            if parameter.is_meta or value.device != comm.device() or not value.is_contiguous():
                parameter = self._replace(parameter, value.to(comm.device()).contiguous())
            places = self.places[parameter]
            self.shapes.append((places, parameter.shape, parameter.dtype, parameter.requires_grad))
            if each is not None:
                each(parameter)

    def taken(self) -> None:
        """It was sharded: remember what was added, and let go of the parameters, which are still whole."""
        self.added = {module: set(vars(module)) - self.before[module] for module in self.before}
        self.places.clear()
        self.names.clear()

    def restore(self) -> None:
        """As before, but that parameters are meta tensors."""
        for module, cls in self.classes.items():
            module.__class__ = cls
            for name in self.added[module]:
                vars(module).pop(name, None)
            for kind in _HOOKS:
                hooks = getattr(module, kind, {})
                for number in [number for number, hook in hooks.items() if self._is_theirs(hook)]:
                    for ids in (hooks, getattr(module, f"{kind}_with_kwargs", {})):
                        ids.pop(number, None)
            _composable_state._module_state_mapping.pop(module, None)
            if type(module._parameters) is not dict:
                vars(module)["_parameters"] = dict(module._parameters.items())
        for places, shape, dtype, trained in self.shapes:
            new = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trained)
            for module, key in places:
                setattr(module, key, new)

    def _replace(self, old: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        for module, key in self.places[old]:
            setattr(module, key, new)  # recurrent layers keep another list of theirs
        self.places[new], self.names[new] = self.places.pop(old), self.names.pop(old)
        return new

    def _is_theirs(self, hook: Any) -> bool:
        inner = getattr(hook, "hook", hook)  # of load_state_dict: wrapped once more
        return str(getattr(inner, "__module__", "")).startswith(self.owner)
