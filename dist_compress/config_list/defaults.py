"""What a type of module is asked when an entry does not say: its targets and their settings.

    register(PRUNING, "MyLinear", {"kernel": {}, "_input_0": {"sparse_ratio": 0.1}})   in Python, for the process
    pruning.default_settings: {MyLinear: {kernel: {max_sparse_ratio: 0.8}}}            in YAML, for the run

The latter overrides the former key by key, and entries of the config list override both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_compress.config_list.checking import by_target
from dist_compress.config_list.entry import Asked, Entry
from dist_compress.config_list.noun import Noun
from dist_compress.errors import UserError
from dist_compress.selection import Modules, type_name


def register(noun: Noun[Any], module_type: str | type[nn.Module], targets: Mapping[str, Mapping[str, Any]]) -> None:
    """Let `targets`, {name of a target: {key of the config list: value}}, be the targets of all modules of a type
    (its class or the name of the class) in this process. Replaces what was registered before; {} takes it back.

    Raises UserError for unknown keys and values out of range.
    """
    name = module_type if isinstance(module_type, str) else module_type.__name__
    where = f"register_defaults({name})"
    checked = by_target(noun, {target: dict(values) for target, values in targets.items()}, where)
    noun.registered[name] = {target: [(values, f"{where}.{target}")] for target, values in checked.items()}


class Defaults:
    """The defaults of a run by module type: registered ones under those of `<noun>.default_settings`."""

    def __init__(self, noun: Noun[Any], given: Mapping[str, Any], modules: Modules) -> None:
        root = f"{noun.setting.NOUN}.default_settings"
        self.noun = noun
        self.by_type = {name: {t: list(a) for t, a in targets.items()} for name, targets in noun.registered.items()}
        for name, targets in given.items():
            if name not in modules.types():
                raise UserError(f"{root}.{name}: no module of this type. Types: {', '.join(sorted(modules.types()))}.")
            own = self.by_type.setdefault(name, {})
            for target, values in by_target(noun, targets, f"{root}.{name}").items():
                own.setdefault(target, []).append((values, f"{root}.{name}.{target}"))

    def names(self, module: nn.Module, entry: Entry) -> list[str]:
        """The targets of a module that an entry which names none is about."""
        return list(self.of(module)) or self.noun.usual(module, entry)

    def of(self, module: nn.Module) -> dict[str, Asked]:
        """{target, by the name that was given: what is asked of it} of a module's type."""
        return self.by_type.get(type_name(module)) or {}
