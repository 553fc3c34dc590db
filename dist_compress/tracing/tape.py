"""The ATen tape of one run of a model: plain records that the speedup engine reads, forwards and backwards.

Tensors are known by identity: a `Ref` is one value of one tensor. An in-place op gives its tensor a new `Ref`, so
the tape reads like a functional program. Ties are visible: a parameter registered twice has one `Ref`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload

_NONE = object()
_PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device))


@dataclass(slots=True, unsafe_hash=True)  # not frozen, which costs time: there are many
class Ref:
    """One value of one tensor; the key of `Trace.tensors`."""

    id: int


@dataclass(slots=True)
class Info:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str  # input | param | buffer | const | value
    fqn: str = ""  # of a param or buffer: its first name in the model
    all_fqns: tuple[str, ...] = ()  # all its names, when it is tied
    dependent: bool = False  # computed from an input of the model


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """The target of a leaf module's one op: calling it calls the module. Equal for modules of one class."""

    module: nn.Module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModuleCall) and type(other.module) is type(self.module)

    def __hash__(self) -> int:
        return hash(type(self.module))

    @property
    def name(self) -> str:
        return f"module:{type(self.module).__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor lie in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def places(self) -> torch.Tensor:
        """int64 of `shape`: the position of each element in the storage."""
        total = torch.full(self.shape, self.offset)
        for d, (size, stride) in enumerate(zip(self.shape, self.stride, strict=True)):
            total += (torch.arange(size) * stride).view([-1 if e == d else 1 for e in range(len(self.shape))])
        return total


@dataclass(frozen=True, eq=False)
class Overlay:
    """The target of an op (old, source): a tensor after `source`, which shares its memory, was written to.

    All are equal: what is written where depends on sizes; `index` tells.
    """

    old: Layout
    source: Layout
    name = "overlay"
    tags = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Overlay)

    def __hash__(self) -> int:
        return hash(Overlay)

    def index(self) -> torch.Tensor:
        """int64 of the shape of `old`: the flat element of `source` that each element is now, -1 for its own."""
        old, source = self.old.places(), self.source.places()
        if not old.numel() or not source.numel():
            return torch.full(self.old.shape, -1)
        found = torch.full((max(int(old.max()), int(source.max())) + 1,), -1)
        found[source.flatten()] = torch.arange(source.numel())
        return found[old]

    def __call__(self, old: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        index = self.index().to(old.device)
        return torch.where(index >= 0, source.reshape(-1)[index.clamp(min=0)], old) if source.numel() else old


@dataclass(frozen=True)
class Op:
    """One ATen call. `args` and `kwargs` are as they were called, with each tensor replaced by its `Ref`.

    Or one call of a leaf module: `inputs` are the tensors among its arguments, then its parameters and buffers in the
    order of `named_parameters()` and `named_buffers()`; `outputs` are the tensors of its result. Or an `Overlay`.
    """

    target: OpOverload | ModuleCall | Overlay
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref | None, ...]  # None where the op returned no tensor
    module: str  # fqn of the innermost module that ran it, "" for the model itself

    @functools.cached_property
    def name(self) -> str:
        """The ATen name without overload and without the in-place underscore: add_.Tensor is "add"."""
        if isinstance(self.target, ModuleCall | Overlay):
            return self.target.name
        return aten_name(self.target)

    @functools.cached_property
    def _positions(self) -> dict[str, tuple[int, Any]]:
        assert isinstance(self.target, OpOverload)
        return _arguments(self.target)

    @property
    def out(self) -> Ref:
        """The first output."""
        assert self.outputs[0] is not None, self.target
        return self.outputs[0]

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument called `name` in the schema, or its schema default, or `default`; a module has no schema."""
        if isinstance(self.target, ModuleCall | Overlay):
            return self.kwargs.get(name, default)
        if name in self.kwargs:
            return self.kwargs[name]
        position, value = self._positions.get(name, (len(self.args), _NONE))
        if position < len(self.args):
            return self.args[position]
        return default if value is _NONE else value


@functools.cache
def aten_name(target: OpOverload) -> str:
    """Of `add_.Tensor` it is "add"."""
    name = target._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


@functools.cache
def _arguments(target: OpOverload) -> dict[str, tuple[int, Any]]:
    """{argument name: (position, the schema's default, `_NONE` when there is none)}."""
    arguments = enumerate(target._schema.arguments)
    return {a.name: (i, a.default_value if a.has_default_value() else _NONE) for i, a in arguments}


@dataclass
class Trace:
    """One run of a model in eval mode."""

    tape: list[Op] = field(default_factory=list)
    tensors: dict[int, Info] = field(default_factory=dict)
    inputs: list[Ref] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)
    calls: list[tuple[str, tuple[Ref, ...]]] = field(default_factory=list)  # (module fqn, its outputs), as ended
    # of what does not depend on the inputs; of all tensors when asked for
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    result: Any = None  # what the model returned
    on_meta: bool = False  # the model was on the meta device
    reads_sizes: bool = True  # python code may have looked at a size, or given one to an op

    def info(self, ref: Ref) -> Info:
        return self.tensors[ref.id]


def map_tensors(tree: Any, fn: Any) -> Any:
    """`tree` with `fn` applied to each tensor or `Ref` in nested lists, tuples and dicts."""
    if type(tree) in _PLAIN:
        return tree
    if isinstance(tree, (torch.Tensor, Ref)):
        return fn(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([item if type(item) in _PLAIN else map_tensors(item, fn) for item in tree])
    if isinstance(tree, dict):
        return {key: map_tensors(item, fn) for key, item in tree.items()}
    return tree
