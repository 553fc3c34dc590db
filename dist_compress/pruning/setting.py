"""What is asked of one target: a parameter of a module, or an activation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from dist_compress import config_list
from dist_compress.blocks import Granularity, is_pattern
from dist_compress.config_list import is_activation
from dist_compress.errors import UserError

AT_MOST = "pruning.at_most"  # also the group of the targets that share it


@dataclass
class Align:
    """The mask follows that of another target: alive where anything is alive at the same place of `dims` there."""

    module_name: str | None  # None: the module of the target itself
    target_name: str
    dims: list[int]


@dataclass
class Setting(config_list.Setting):
    """One target and what is asked of it; the values of all entries that name it, merged key by key."""

    NOUN = "pruning"
    INHERITED = ("sparse_ratio", "method", "options")

    target: str = "weight"
    sparse_ratio: float | Fraction = 0.0
    sparse_threshold: float | None = None
    min_sparse_ratio: float = 0.0
    max_sparse_ratio: float = 1.0
    granularity: Granularity = "default"
    global_group_id: str | None = None
    dependency_group_id: str | None = "auto"
    internal_metric_block: int = 1
    apply_method: str = "mul"
    apply_options: dict[str, Any] = field(default_factory=dict)
    align: Align | None = None
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def parameter(self) -> str:
        return self.path

    @property
    def limited(self) -> bool:
        """No ratio is asked of it; it shares `pruning.at_most`."""
        return AT_MOST in self.sources

    @property
    def activation(self) -> bool:
        """An activation and no parameter."""
        return is_activation(self.target)

    @property
    def by_units(self) -> bool:
        """Channels, or units of an activation, are decided, not blocks of weights."""
        return self.activation or self.granularity in ("out_channel", "in_channel")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) when N of each M weights are kept."""
        if not is_pattern(self.granularity):
            return None
        n, m = str(self.granularity).split(":")
        return int(n), int(m)


def check_agree(a: Setting, b: Setting, keys: Iterable[str], group: str) -> None:
    """Raise UserError naming both targets, entries and values unless the members of one group agree on `keys`."""
    for key in keys:
        if getattr(a, key) != getattr(b, key):
            kind = f"{group}={getattr(a, group)!r}" if getattr(a, group) is not None else group
            raise UserError(
                f"{a.name} and {b.name} are in one group ({kind}) but {a.said_by(key)} for the one and "
                f"{b.said_by(key)} for the other. Give both the same {key}, or take one out of the group."
            )
