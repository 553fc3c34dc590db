"""Which modules an entry of the config list is about.

    (op_names | modules matching op_names_re) & op_types, or op_types alone; minus what the exclude_ keys name

where a type is the exact class name (of a parametrized module, that of the class it was), and a pattern must match
from the start of the module name (`re.match`). What matches nothing is an error. A call of a function
(dist_compress.functions) has the function's name for a type, and is meant only by its own name or with its type.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from dist_compress.errors import UserError
from dist_compress.functions import Call

SELECTORS = ("op_types", "op_names", "op_names_re")
EXCLUDES = tuple(f"exclude_{key}" for key in SELECTORS)


class Modules:
    """The named modules of a model; a module with several names goes by its first."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: module for name, module in model.named_modules() if name}
        first = {id(module): name for name, module in self.modules.items()}
        self.names = {name: first[id(m)] for name, m in model.named_modules(remove_duplicate=False) if name}

    def types(self) -> set[str]:
        return {type_name(module) for module in self.modules.values()}

    def chosen(self, entry: dict[str, Any], where: str) -> list[str]:
        """The modules an entry selects, in model order. Raises UserError."""
        found = {key: self._match(entry.get(key, []), key, where) for key in (*SELECTORS, *EXCLUDES)}
        if not entry.get("op_types"):
            found["op_names_re"] -= {name for name, module in self.modules.items() if isinstance(module, Call)}
        chosen = found["op_names"] | found["op_names_re"]
        if not (entry.get("op_names") or entry.get("op_names_re")):
            chosen = found["op_types"]
        elif entry.get("op_types"):
            chosen &= found["op_types"]
        chosen -= found["exclude_op_types"] | found["exclude_op_names"] | found["exclude_op_names_re"]
        if not chosen:
            raise UserError(f"{where}: nothing is left of what it selects. Check op_types and the exclude_ keys.")
        return [name for name in self.modules if name in chosen]

    def prunable_types(self, least: int) -> str:
        """Types with a weight of so many dims or more, for messages."""
        return ", ".join(sorted({type_name(m) for m in self.modules.values() if weight_dims(m) >= least}))

    def _match(self, wanted: list[str], key: str, where: str) -> set[str]:
        """Modules named by one selector. Each of its values must name at least one."""
        found: set[str] = set()
        for value in wanted:
            if key.endswith("op_types"):
                hits = {name for name, module in self.modules.items() if type_name(module) == value}
            elif key.endswith("op_names"):
                hits = {self.names[value]} if value in self.names else set()
            else:
                try:
                    hits = {first for name, first in self.names.items() if re.match(value, name)}
                except re.error as error:
                    raise UserError(f"{where}.{key}={value!r} is no regular expression: {error}.") from None
            if not hits:
                raise UserError(f"{where}.{key}={value!r} matches no module; {self._inventory(value, key)}")
            found |= hits
        return found

    def _inventory(self, value: str, key: str) -> str:
        if key.endswith("op_types"):
            return f"types in this model: {self.prunable_types(1)}."
        close = difflib.get_close_matches(value, self.names, n=3, cutoff=0.5)
        weighted = [name for name in self.names if weight_dims(self.modules[self.names[name]]) >= 2]
        listed = ", ".join(weighted[:30]) + (f", ... ({len(weighted)} in all)" if len(weighted) > 30 else "")
        return (f"did you mean {' or '.join(close)}? " if close else "") + f"names in this model: {listed}."


def type_name(module: nn.Module) -> str:
    """Its class name; torch.nn.utils.parametrize puts a class of its own in the place of the one it was. Of a call the
    name of the function."""
    if isinstance(module, Call):
        return module.function
    return parametrize.type_before_parametrizations(module).__name__


def how_computed(module: nn.Module) -> str:
    """Why a layer has a weight that is no parameter, and what to call first; "" when it is not computed."""
    if parametrize.is_parametrized(module, "weight"):
        return "a parametrization: call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
    if "weight_orig" in module._parameters:
        return "a mask of torch.nn.utils.prune or a spectral norm: call its remove function on the module first"
    if "weight_v" in module._parameters:
        return "a weight norm: call torch.nn.utils.remove_weight_norm(module) first"
    return ""


def weight_dims(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None else weight.dim()
