"""What is asked of one target, and where in the config each value of it was written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

OWN = ("module", "target", "sources", "overridden")  # fields that are no keys of the config list


@dataclass
class Setting:
    """One target of a module. A noun derives from it: each field it adds is a key of its config list, with the default
    of the key."""

    NOUN: ClassVar[str] = ""  # the section of the config, such as "pruning"
    INHERITED: ClassVar[tuple[str, ...]] = ()  # keys that are taken from the section itself when no entry sets them

    module: str  # fqn
    target: str  # name of a parameter of the module, or of a site (dist_compress.sites), such as _input_0
    sources: dict[str, str] = field(default_factory=dict, kw_only=True)  # key -> place; "" -> the last that matched
    overridden: list[tuple[str, str]] = field(default_factory=list, kw_only=True)  # (what won, what it overrode)

    @property
    def path(self) -> str:
        return f"{self.module}.{self.target}"

    @property
    def name(self) -> str:
        """The module where its weight is meant, else module and target. Distinct for all targets."""
        return self.module if self.target == "weight" else self.path

    def said_by(self, key: str) -> str:
        """A value and where it comes from, for messages: "pruning.config_list[0].sparse_ratio=0.5"."""
        value = shown(getattr(self, key))
        if key in self.sources:
            return f"{self.sources[key]}.{key}={value}"
        if key in self.INHERITED:
            return f"{self.NOUN}.{key}={value}"
        return f"{key}={value} by default"

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """What an entry may ask of a target."""
        return tuple(f.name for f in fields(cls) if f.name not in OWN)

    @classmethod
    def default(cls, key: str) -> Any:
        """A fresh default value of `key`."""
        return getattr(cls("", ""), key)


def shown(value: Any) -> str:
    """A value as the user wrote it."""
    return repr(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value)
