"""What a user asks of the engine besides the masks: norms, rounding, and what has to stay."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from dist_compress.errors import UserError

NORMS = ("keep", "exact", "plain")


@dataclass(frozen=True)
class Settings:
    """Raises UserError on values that are not allowed; patterns are checked when they meet a model."""

    norm: str = "keep"  # keep: normalised dims stay; exact: norms divide by the old width; plain: by the new one
    round_to: int = 1  # kept counts of dims that shrink are multiples of it
    keep: tuple[str, ...] = ()  # fqns or patterns of parameters and modules whose dims all stay
    barrier: tuple[str, ...] = ()  # fqns or patterns of modules: all that ops inside touch stays

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UserError(f"norm={self.norm!r} is not known; allowed are {', '.join(map(repr, NORMS))}.")
        if type(self.round_to) is not int or self.round_to < 1:
            raise UserError(f"round_to={self.round_to!r} must be a positive integer, such as 1, 8, 16 or 64.")
        for name in ("keep", "barrier"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"{name}={value!r} must be a list of names or patterns, not one string.")
            object.__setattr__(self, name, tuple(value))

    def kept_parameters(self, model: nn.Module) -> dict[str, str]:
        """{fqn of a parameter or buffer that `keep` names, itself or a module around it: the pattern}."""
        if not self.keep:
            return {}
        tensors = [fqn for fqn, _ in model.named_parameters(remove_duplicate=False)]
        tensors += [fqn for fqn, _ in model.named_buffers(remove_duplicate=False)]
        found = {fqn: pattern for pattern in self.keep for fqn in tensors if fnmatchcase(fqn, pattern)}
        inside = _inside(model, self.keep)
        for pattern in self.keep:
            if not any(pattern == p for p in (*found.values(), *inside.values())):
                raise _no_match("keep", pattern, [*tensors, *_names(model)])
        return {fqn: inside[fqn.rpartition(".")[0]] for fqn in tensors if fqn.rpartition(".")[0] in inside} | found

    def barrier_modules(self, model: nn.Module) -> dict[str, str]:
        """{fqn of a module that `barrier` names, itself or a module around it: the pattern}."""
        if not self.barrier:
            return {}
        found = _inside(model, self.barrier)
        for pattern in self.barrier:
            if not any(fnmatchcase(name, pattern) for name in _names(model)):
                raise _no_match("barrier", pattern, _names(model))
        return found


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _inside(model: nn.Module, patterns: Iterable[str]) -> dict[str, str]:
    """{fqn of a module that a pattern names, or that is inside one: the pattern}."""
    names = _names(model)
    found: dict[str, str] = {}
    for pattern in patterns:
        tops = tuple(name for name in names if fnmatchcase(name, pattern))
        found |= {name: pattern for name in names for top in tops if name == top or name.startswith(f"{top}.")}
    return found


def _no_match(key: str, pattern: str, names: list[str]) -> UserError:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    hint = f" Near matches: {', '.join(near)}." if near else f" Names look like {', '.join(names[:3])}."
    return UserError(f"{key}: {pattern!r} matches nothing in this model.{hint}")
