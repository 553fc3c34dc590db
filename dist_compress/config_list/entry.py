"""One entry of a config list, as it was written and normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Asked = list[tuple[dict[str, Any], str]]  # values and where they stand, the later ones win


def is_activation(name: str) -> bool:
    return name.startswith(("_input_", "_output_"))


@dataclass
class Entry:
    """An entry, normalised. `given` is as the user wrote it; `where` the place it was written at."""

    where: str
    given: dict[str, Any]
    values: dict[str, Any]
    target_names: list[str]
    target_settings: dict[str, dict[str, Any]]

    def names(self) -> list[str]:
        """Targets that it names anywhere."""
        return list(dict.fromkeys([*self.target_names, *self.target_settings]))

    def asked_of(self, names: list[str]) -> Asked:
        """What it asks of the target that goes by any of `names`, the more general ones first."""
        own = [
            (self.target_settings[n], f"{self.where}.target_settings.{n}") for n in names if n in self.target_settings
        ]
        return [(self.values, self.where), *own]
