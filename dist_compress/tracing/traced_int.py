"""A size that remembers where it came from: an int to everybody, with the graph node that computes it again.

`+ - * // %` and negation on such ints are recorded; every other use - comparison, `int()`, `math`, indexing,
formatting - sees an int and fixes the value: a specialisation, never a failure.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Node


class TracedInt(int):
    """`node` computes the value when the graph is replayed; None once the recording is over."""

    node: Node | None
    family: list[TracedInt]  # every traced int of the recording

    def __new__(cls, value: int, node: Node, family: list[TracedInt]) -> TracedInt:
        self = super().__new__(cls, value)
        self.node, self.family = node, family
        family.append(self)
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)  # a copied or pickled model that kept a size holds no graph

    def forget(self) -> None:
        """Be a plain int from now on: a model may have kept this size."""
        self.node, self.family = None, []


def _binary(plain: Callable[[int, int], int], function: Callable[..., Any], swapped: bool = False) -> Any:
    def method(self: TracedInt, other: Any) -> Any:
        value = plain(self, other)
        if value is NotImplemented or self.node is None:
            return value
        operand = other.node if isinstance(other, TracedInt) and other.node is not None else int(other)
        operands = (operand, self.node) if swapped else (self.node, operand)
        return TracedInt(value, self.node.graph.call_function(function, operands), self.family)

    return method


def _negative(self: TracedInt) -> int:
    value = int.__neg__(self)
    if self.node is None:
        return value
    return TracedInt(value, self.node.graph.call_function(operator.neg, (self.node,)), self.family)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _function = getattr(operator, _name)
    setattr(TracedInt, f"__{_name}__", _binary(getattr(int, f"__{_name}__"), _function))
    setattr(TracedInt, f"__r{_name}__", _binary(getattr(int, f"__r{_name}__"), _function, swapped=True))
TracedInt.__neg__ = _negative  # type: ignore[method-assign]
