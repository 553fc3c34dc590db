"""What is asked of one target: a parameter of a module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from dist_compress.blocks import Granularity, is_pattern
from dist_compress.errors import UserError

ROOT = "pruning.config_list"


@dataclass
class Align:
    """The mask follows that of another parameter: alive where anything is alive at the same place of `dims` there."""

    module_name: str | None  # None: the module of the target itself
    target_name: str
    dims: list[int]


@dataclass
class Setting:
    """One target and what is asked of it; the values of all entries that name it, merged key by key."""

    module: str  # fqn
    target: str = "weight"  # name of a parameter of the module
    sparse_ratio: float = 0.0
    sparse_threshold: float | None = None
    min_sparse_ratio: float = 0.0
    max_sparse_ratio: float = 1.0
    granularity: Granularity = "default"
    global_group_id: str | None = None
    dependency_group_id: str | None = "auto"
    internal_metric_block: int = 1
    apply_method: str = "mul"
    align: Align | None = None
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)  # key -> place in the config; "" -> the last that matched
    overridden: list[tuple[str, str]] = field(default_factory=list)  # (what won, what it overrode), for the report

    @property
    def parameter(self) -> str:
        return f"{self.module}.{self.target}"

    @property
    def name(self) -> str:
        """The module where its weight is meant, else the parameter. Distinct for all targets."""
        return self.module if self.target == "weight" else self.parameter

    @property
    def by_units(self) -> bool:
        """Channels are decided, not blocks of weights."""
        return self.granularity in ("out_channel", "in_channel")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) when N of each M weights are kept."""
        if not is_pattern(self.granularity):
            return None
        n, m = str(self.granularity).split(":")
        return int(n), int(m)

    def said_by(self, key: str) -> str:
        """Where the value of `key` comes from, for messages."""
        if key in self.sources:
            return f"{self.sources[key]}.{key}={shown(getattr(self, key))}"
        if key in ("sparse_ratio", "method", "options"):
            return f"pruning.{key}={getattr(self, key)!r}"
        return f"{key}={shown(getattr(self, key))} by default"


VALUES = tuple(f.name for f in fields(Setting) if f.name not in ("module", "target", "sources", "overridden"))
DEFAULTS = {f.name: f.default for f in fields(Setting) if f.name in VALUES}


def shown(value: Any) -> str:
    """A value as the user wrote it."""
    return repr({f.name: getattr(value, f.name) for f in fields(Align)} if isinstance(value, Align) else value)


def check_agree(a: Setting, b: Setting, keys: Iterable[str], group: str) -> None:
    """Raise UserError naming both targets, entries and values unless the members of one group agree on `keys`."""
    for key in keys:
        if getattr(a, key) != getattr(b, key):
            kind = f"{group}={getattr(a, group)!r}" if getattr(a, group) is not None else group
            raise UserError(
                f"{a.name} and {b.name} are in one group ({kind}) but {a.said_by(key)} for the one and "
                f"{b.said_by(key)} for the other. Give both the same {key}, or take one out of the group."
            )
