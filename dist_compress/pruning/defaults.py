"""What a type of module is asked when an entry does not say: its targets and their settings.

Without more, the target of any module is its `weight`. For modules of one's own:

    register_defaults("MyLinear", {"kernel": {}, "shift": {"align": {...}}})      in Python, for the process
    pruning.default_settings: {MyLinear: {kernel: {max_sparse_ratio: 0.8}}}       in YAML, for the run

The latter overrides the former key by key, and entries of the config list override both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_compress.config import PruningConfig
from dist_compress.errors import UserError
from dist_compress.pruning.entry import by_target
from dist_compress.selection import Modules

Asked = list[tuple[dict[str, Any], str]]  # values and where they stand
_REGISTERED: dict[str, dict[str, Asked]] = {}


def register_defaults(module_type: str | type[nn.Module], targets: Mapping[str, Mapping[str, Any]]) -> None:
    """Let `targets`, {name of a parameter: {key of the config list: value}}, be the targets of all modules of a type
    (its class or the name of the class) in this process. Replaces what was registered before; {} takes it back.

    Raises UserError for unknown keys and values out of range.
    """
    name = module_type if isinstance(module_type, str) else module_type.__name__
    where = f"register_defaults({name})"
    checked = by_target({target: dict(values) for target, values in targets.items()}, where)
    _REGISTERED[name] = {target: [(values, f"{where}.{target}")] for target, values in checked.items()}


class Defaults:
    """The defaults of a run: registered ones under those of `pruning.default_settings`."""

    def __init__(self, config: PruningConfig, modules: Modules) -> None:
        root = "pruning.default_settings"
        self.by_type = {name: {t: list(asked) for t, asked in targets.items()} for name, targets in _REGISTERED.items()}
        for name, targets in config.default_settings.items():
            if name not in modules.types():
                raise UserError(f"{root}.{name}: no module of this type. Types: {', '.join(sorted(modules.types()))}.")
            own = self.by_type.setdefault(name, {})
            for target, values in by_target(targets, f"{root}.{name}").items():
                own.setdefault(target, []).append((values, f"{root}.{name}.{target}"))

    def of(self, module: nn.Module, least: int) -> dict[str, Asked]:
        """{target: what is asked of it} of the parameters that the module has; a weight nobody has registered needs
        `least` dims."""
        own = self.by_type.get(type(module).__name__) or {}
        if own:
            return {t: asked for t, asked in own.items() if module._parameters.get(t) is not None}
        weight = module._parameters.get("weight")
        return {"weight": []} if weight is not None and weight.dim() >= least else {}
