"""What stands in the place of a module's forward: its name, hooks and parameters stay. Several may lie on top of each
other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any

from torch import nn


class Forward:
    """The base. (An object that knows the module, so that a deep copy of the module runs the copy.)"""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.previous: Callable[..., Any] | None = vars(owner).get("forward")
        owner.forward = self  # type: ignore[method-assign]

    def remove(self) -> None:
        """The module's forward is what it was; what came later has to be removed before."""
        if self.previous is None:
            del self.owner.forward
        else:
            self.owner.forward = self.previous  # type: ignore[method-assign]

    @property
    def inner(self) -> Callable[..., Any]:
        """The forward below."""
        return MethodType(self.of_class(), self.owner) if self.previous is None else self.previous

    def run_inner(self, *args: Any, **kwargs: Any) -> Any:
        """`inner(*args, **kwargs)`, as torch.compile can follow it."""
        if self.previous is None:
            return self.of_class()(self.owner, *args, **kwargs)
        return self.previous(*args, **kwargs)

    def of_class(self) -> Callable[..., Any]:
        """What the module runs if nothing else stands there."""
        return type(self.owner).forward

    @property
    def __code__(self) -> CodeType:  # torch.export asks for it
        return self.inner.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)
