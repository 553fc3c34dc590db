"""What the config lists of one noun (pruning, quantization, distillation) may say: the part that each noun gives.

A noun derives from `Setting` (its keys) and from `Noun` (what is checked and what is a target by default), makes one
instance of the latter and hands it to `merge`:

    @dataclass
    class Setting(config_list.Setting):
        NOUN = "quantization"
        quant_dtype: str = "int8"

    class Quantization(Noun[Setting]):
        setting = Setting
        def values(self, given, where): ...      # check and normalise what is asked of one target
        def usual(self, module, entry): ...      # the targets that an entry is about when it names none

    QUANTIZATION = Quantization()
    merged = merge(QUANTIZATION, config.config_list, config.default_settings, model, Sites(model, args, kwargs))

Nothing here is collective; the result is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from torch import nn

from dist_compress.config_list.entry import Asked, Entry
from dist_compress.config_list.setting import Setting
from dist_compress.selection import Modules

S = TypeVar("S", bound=Setting)


class Noun(Generic[S]):
    """The base of what a noun says about its config list."""

    setting: type[S]
    takes_back: tuple[str, ...] = ()  # keys that null in an entry takes back; for the others null is a value
    ids: tuple[str, ...] = ()  # keys that put a target in a group: two different ids in one list are an error
    alternatives: tuple[str, ...] = ()  # keys that answer one question: a later one takes the place of the others
    belongs: Mapping[str, str] = {}  # {a: b}: who sets a and not b resets b, as a method its options

    def __init__(self) -> None:
        self.registered: dict[str, dict[str, Asked]] = {}

    @property
    def root(self) -> str:
        """Where the list stands, for messages."""
        return f"{self.setting.NOUN}.config_list"

    def values(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        """What is asked of one target at the place `where`, checked and normalised. Keys are known; None in one of
        `takes_back` stays None. Raises UserError with `where` and the key."""
        return given

    def check_target(self, name: str, what: str) -> None:
        """Raise UserError, beginning with `what`, when no target of this noun can have this name."""

    def usual(self, module: nn.Module, entry: Entry) -> list[str]:
        """Names of the targets of a module when neither `target_names` nor a default for its type tells."""
        raise NotImplementedError

    def unfit(self, modules: Modules, entry: Entry) -> str:
        """Ends "... selects a.b (Type), which has": what a module lacks that has no target, and what there is."""
        raise NotImplementedError
