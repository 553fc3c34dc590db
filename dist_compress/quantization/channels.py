"""Which channels can be multiplied by a number here and divided by it there, so that a model computes what it did.

A fold has a producer, whose weights are divided: a LayerNorm or RMSNorm, the multiplication with a vector that ends a
norm of a model's own, or a linear layer; and readers, linear layers that multiply the columns that meet these channels.
Nothing is known of architectures. The model is traced, and from each producer on every element of a tensor carries the
number of its channel: ops that move elements are run on these numbers, a product with another tensor, ReLU and the
values of an attention keep them, and where anything else looks at a channel (a residual sum, GELU, what the model
returns, a tied weight) that channel stays as it is. So norm -> q, k, v, norm -> gate, up, up -> down, v -> output are
found in blocks that compute them, fused projections included; heads that share their values share the number.

Everything here is local.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from dist_compress import comm
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.sites import Sites
from dist_compress.tracing.tape import ModuleCall, Op, Ref, Trace, map_tensors
from dist_compress.tracing.trace import trace
from dist_compress.tracing.weightless import weightless

_NONE = -1  # the number of an element that belongs to no channel
_MOVES = frozenset(
    "_unsafe_view alias clone contiguous detach expand lift_fresh permute select slice split split_with_sizes squeeze "
    "t transpose unbind unsqueeze view".split()
)
_KEEPS = frozenset("_to_copy abs leaky_relu neg relu".split())  # f(s * x) = s * f(x) for s > 0, element by element


@dataclass(frozen=True)
class Reader:
    """A layer whose input carries channels."""

    layer: str
    source: str  # the first of the layers that read the same tensor
    channels: torch.Tensor  # int64 [features]: the channel of each input feature, -1: none that may change


@dataclass(frozen=True)
class Fold:
    """Dividing `parameters` by s, float [num_channels], and multiplying the columns of all `readers` by it changes
    nothing. Only channels that some reader names may have an s other than 1."""

    parameters: tuple[tuple[str, int], ...]  # (name, dim of the channels)
    num_channels: int
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Graph:
    """What is known of the layers of a model with a linear form."""

    folds: tuple[Fold, ...]  # in the order of the model, no layer reads in two of them
    sources: dict[str, str]  # {layer: the first of the layers that read the same tensor}


def find(sites: Sites) -> Graph:
    """Traces the model. Raises UserError where it fails on the example."""
    with weightless(sites.model, comm.device()):
        taped = trace(sites.model, sites.args, sites.kwargs, leaves=_is_leaf)
    names = {module: name for name, module in reversed(list(sites.model.named_modules()))}
    return _Finder(taped, names).graph()


def column_dim(layer: nn.Module) -> int:
    """The dimension of a linear layer's weight along its input features."""
    return 0 if type(layer).__name__ == "Conv1D" else 1


def _is_linear(module: nn.Module) -> bool:
    """Linear or transformers' Conv1D, with the forward and a weight of its own."""
    known = getattr(type(module), "forward", None) is nn.Linear.forward or type(module).__name__ == "Conv1D"
    plain = all(isinstance(child, FakeQuantize) for child in module.children())
    return known and plain and isinstance(module._parameters.get("weight"), nn.Parameter)


def _is_leaf(module: nn.Module) -> bool:
    return _is_linear(module) or type(module) in (nn.LayerNorm, nn.RMSNorm)


class _Finder:
    def __init__(self, taped: Trace, names: dict[nn.Module, str]) -> None:
        self.trace, self.names = taped, names
        self.users: dict[int, list[int]] = {}  # value: the ops that read it
        for number, op in enumerate(taped.tape):
            for ref in set(op.inputs):
                self.users.setdefault(ref.id, []).append(number)
        self.uses = Counter(i for op in taped.tape for i in {ref.id for ref in op.inputs})
        self.params = {info.fqn: i for i, info in taped.tensors.items() if info.kind == "param"}
        self.returned = {ref.id for ref in taped.outputs}

    def graph(self) -> Graph:
        calls = [(self.names[_called(op)], op.inputs[0].id) for op in self.trace.tape if _is_linear_call(op)]
        times = Counter(name for name, _ in calls)
        first: dict[int, str] = {}
        sources = {name: first.setdefault(i, name) if times[name] == 1 else name for name, i in calls}
        folds: list[Fold] = []
        taken: set[str] = set()
        for number, op in enumerate(self.trace.tape):
            parameters = self._produced(op)
            fold = self._follow(number, op.out, parameters, sources) if parameters else None
            if fold and not taken & {reader.layer for reader in fold.readers}:
                folds.append(fold)
                taken |= {reader.layer for reader in fold.readers}
        return Graph(tuple(folds), sources)

    def _produced(self, op: Op) -> tuple[tuple[str, int], ...]:
        """The parameters that the last dimension of what an op puts out is proportional to; () if there are none, or
        something else reads them, too."""
        found: list[tuple[str, int]] = []
        if isinstance(op.target, ModuleCall):
            module, name = op.target.module, self.names[op.target.module]
            rows = 1 - column_dim(module) if _is_linear(module) else 0
            dims = {"weight": rows, "bias": 0}
            found = [(f"{name}.{key}", dims[key]) for key, value in module._parameters.items() if value is not None]
            if not _is_linear(module) and (not found or len(module.normalized_shape) != 1):  # type: ignore[arg-type]
                return ()
        elif op.name == "mul" and len(op.inputs) == 2:
            size = self.trace.info(op.out).shape[-1:]
            infos = [self.trace.info(ref) for ref in op.inputs]
            found = [(info.fqn, 0) for info in infos if info.kind == "param" and info.shape == size]
        return tuple(found) if all(self._is_alone(name) for name, _ in found) else ()

    def _is_alone(self, name: str) -> bool:
        """Whether a parameter has one name and one reader."""
        number = self.params.get(name)
        return number is not None and self.uses[number] == 1 and len(self.trace.tensors[number].all_fqns) < 2

    def _follow(
        self, number: int, out: Ref, parameters: tuple[tuple[str, int], ...], sources: dict[str, str]
    ) -> Fold | None:
        """The channels of a producer, through all that reads them."""
        shape = self.trace.info(out).shape
        labels = {out.id: torch.arange(shape[-1]).expand(shape)}
        fixed = torch.zeros(shape[-1] + 1, dtype=torch.bool)  # the last: of _NONE
        fixed[_NONE] = True
        found: list[tuple[str, torch.Tensor]] = []
        waiting, seen = list(self.users.get(out.id, [])), {number}
        if out.id in self.returned:
            return None
        heapq.heapify(waiting)
        while waiting and not bool(fixed.all()):
            number = heapq.heappop(waiting)
            if number in seen:
                continue
            seen.add(number)
            op = self.trace.tape[number]
            inside = [labels[ref.id] for ref in op.inputs if ref.id in labels]
            features = self._read(op, labels)
            if features is not None:
                found.append((self.names[_called(op)], features))
                continue
            made = [ref for ref in op.outputs if ref is not None]
            outs = self._through(op, labels)
            if outs is None or [tuple(o.shape) for o in outs] != [self.trace.info(ref).shape for ref in made]:
                for label in inside:
                    fixed[label.unique()] = True
                continue
            for ref, label in zip(made, outs, strict=True):
                labels[ref.id] = label
                if ref.id in self.returned:
                    fixed[label.unique()] = True
                for user in self.users.get(ref.id, []):
                    heapq.heappush(waiting, user)
        readers = []
        for layer, features in found:
            free = torch.where(fixed[features], _NONE, features)
            if bool((free != _NONE).any()):
                readers.append(Reader(layer, sources[layer], free))
        return Fold(parameters, shape[-1], tuple(readers)) if readers else None

    def _read(self, op: Op, labels: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """int64 [features] if a linear layer of its own reads channels as its input features; else None."""
        if not _is_linear_call(op):
            return None
        given, name = labels.get(op.inputs[0].id), self.names[_called(op)]
        if given is None or not self._is_alone(f"{name}.weight"):
            return None
        rows = given.reshape(-1, given.shape[-1])
        return rows[0] if len(rows) and bool((rows == rows[:1]).all()) else None

    def _through(self, op: Op, labels: dict[int, torch.Tensor]) -> list[torch.Tensor] | None:
        """The channels of what an op puts out, if each element of it is proportional to one that carries a channel."""
        carriers = [ref for ref in op.inputs if ref.id in labels]
        label, shape = labels[carriers[0].id], self.trace.info(op.out).shape
        if not self.trace.info(op.out).dtype.is_floating_point:
            return None
        if op.name == "cat":
            return _joined(op, labels, self.trace)
        if len(op.inputs) == 1 and op.name in _MOVES:
            return _moved(op, label)
        if len(op.inputs) == 1 and op.name in _KEEPS:
            return [label]
        if len(carriers) > 1 or isinstance(op.target, ModuleCall):
            return None
        is_left = carriers[0] == op.args[0]
        if op.name == "mul" or op.name == "div" and is_left and op.arg("rounding_mode") is None:
            return [label.expand(shape)]
        return _product(label, is_left, shape) if op.name in ("mm", "bmm") else None


def _is_linear_call(op: Op) -> bool:
    return isinstance(op.target, ModuleCall) and _is_linear(op.target.module)


def _called(op: Op) -> nn.Module:
    assert isinstance(op.target, ModuleCall)
    return op.target.module


def _moved(op: Op, label: torch.Tensor) -> list[torch.Tensor]:
    """The op, run on the numbers of channels."""
    if op.name in ("view", "_unsafe_view") and op.arg("size") is not None:  # whose strides may be others
        return [label.reshape(op.arg("size"))]
    args, kwargs = map_tensors(op.args, lambda ref: label), map_tensors(op.kwargs, lambda ref: label)
    outs = op.target(*args, **kwargs)
    return list(outs) if isinstance(outs, list | tuple) else [outs]


def _joined(op: Op, labels: dict[int, torch.Tensor], trace: Trace) -> list[torch.Tensor]:
    """cat; what carries no channel may be beside it."""
    refs, dim = op.args[0], op.arg("dim", 0)
    parts = [labels.get(ref.id, torch.full(trace.info(ref).shape, _NONE)) for ref in refs]
    return [torch.cat([part for part in parts if part.dim() > 1 or part.numel()], dim)]


def _product(label: torch.Tensor, is_left: bool, shape: tuple[int, ...]) -> list[torch.Tensor] | None:
    """mm and bmm: what is summed over must be of one channel."""
    dim = -1 if is_left else -2
    first = label.narrow(dim, 0, 1)
    return [first.expand(shape)] if label.shape[dim] and bool((label == first).all()) else None
