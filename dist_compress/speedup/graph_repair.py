"""New numbers for a recorded graph, so that it runs with the parameters of the shrunk module.

The graph is interpreted with what is kept of the recorded arguments. Each call gets the numbers that follow from the
kept sizes (graph_literals.py); where it still does not give the planned shape, its other integers are tried, one by
one, with the kept counts of dims of their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from dist_compress.errors import UserError
from dist_compress.speedup.graph_align import Aligned, Interpreter
from dist_compress.speedup.graph_literals import Call, Changes, Kept, changed, changes_of, literal_paths, name_of
from dist_compress.speedup.keep import Keep
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Ref
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.verify import verify


class Kepts:
    """What is kept of the tensors of a tape. `values`: those the shrunk model must give again, as far as known."""

    def __init__(self, s: Structure, keep: Keep, values: dict[int, torch.Tensor]) -> None:
        self.structure, self.keep, self.values = s, keep, values
        self.counts: dict[int, set[int]] = {}  # old size -> kept counts
        for kept in keep.kept.values():
            self.counts.setdefault(len(kept), set()).add(int(kept.sum()))

    def dims(self, ref: Ref | None) -> list[Kept] | None:
        """None for a tensor that the structure does not know: it stays whole."""
        if ref is None or ref.id not in self.structure._dims:
            return None
        return [self.keep.kept[var] for var in self.structure.dims(ref)]

    def shape(self, ref: Ref | None) -> tuple[int, ...] | None:
        dims = self.dims(ref)
        return None if dims is None else tuple(int(kept.sum()) for kept in dims)

    def value(self, ref: Ref | None) -> torch.Tensor | None:
        """What is kept of the recorded value, where it is known."""
        value = None if ref is None else self.values.get(ref.id)
        return None if value is None or ref is None else self.slice(value, ref)

    def planned(self, ref: Ref) -> torch.Tensor:
        """The kept value, or zeros of the planned shape."""
        value, shape = self.value(ref), self.shape(ref)
        assert shape is not None
        return torch.zeros(shape, dtype=self.structure.trace.info(ref).dtype) if value is None else value.clone()

    def slice(self, tensor: torch.Tensor, ref: Ref | None) -> torch.Tensor:
        for dim, kept in enumerate(self.dims(ref) or ()):
            if not bool(kept.all()):
                tensor = tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))
        return tensor


def sliced_inputs(aligned: Aligned, kepts: Kepts) -> Any:
    """(args, kwargs) as the shrunk model calls the module."""

    def of(x: Any, ref: Ref | None) -> Any:
        return kepts.slice(x.detach().clone(), ref) if isinstance(x, torch.Tensor) else x

    return tree_map(of, aligned.inputs, aligned.input_refs)


def repair(aligned: Aligned, module: nn.Module, kepts: Kepts) -> dict[str, Changes]:
    """{node name: {argument path: new value}} for the shrunk `module`. Raises UserError when there are none."""
    runner = _Repair(aligned, module, kepts)
    args, kwargs = sliced_inputs(aligned, kepts)
    with untouched(module):  # it shares tensors with the model
        runner.run_with(args, kwargs)
    return runner.found


def as_planned(outputs: Any, refs: Any, kepts: Kepts, tolerance: float | None = None) -> bool:
    """Whether each tensor has its planned shape and, with a tolerance, what is kept of its recorded value."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    known = [leaf for leaf in tree_leaves(refs) if isinstance(leaf, Ref)]
    if len(tensors) != len(known):  # some of them are not on the tape: nothing to hold against them
        return True
    for tensor, ref in zip(tensors, known, strict=True):
        shape, value = kepts.shape(ref), kepts.value(ref)
        if shape is not None and tuple(tensor.shape) != shape:
            return False
        if tolerance is not None and value is not None and verify(value, tensor) > tolerance:
            return False
    return True


class _Repair(Interpreter):
    def __init__(self, aligned: Aligned, module: nn.Module, kepts: Kepts) -> None:
        super().__init__(module, aligned.program)
        self.aligned, self.kepts = aligned, kepts
        self.found: dict[str, Changes] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            return self._called(n)
        if n.op not in ("call_function", "call_method") or n.name in self.aligned.ints:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        changes = {path: v for path, v in changes_of(self._call(n)).items() if _get(args, kwargs, path) != v}
        error: Exception | None = None
        if not changes:
            try:
                result = (self._trial if _writes(n) else self._execute)(n.target, args, kwargs)
                if not as_planned(result, self.aligned.refs[n.name], self.kepts):
                    error = ValueError(f"its result has another shape: {_shapes(result)}")
                elif not _writes(n):
                    return result
            except Exception as failure:
                error = failure
        if changes or error is not None:
            changes = self.found[n.name] = self._search(n, args, kwargs, changes, error)
        return self._execute(*changed((n.target, args, kwargs), changes))

    def _called(self, n: fx.Node) -> Any:
        """A submodule whose own code fails may become a graph as well: it is taken to give what is planned."""
        try:
            return super().run_node(n)
        except Exception:
            refs = self.aligned.refs[n.name]
            if not all(isinstance(ref, Ref) and self.kepts.shape(ref) is not None for ref in tree_leaves(refs)):
                raise
            return tree_map(self.kepts.planned, refs)

    def _call(self, n: fx.Node) -> Call:
        ints, refs = self.aligned.ints, self.aligned.refs
        args = fx.map_arg(n.args, lambda a: ints.get(a.name, a))
        kwargs = fx.map_arg(n.kwargs, lambda a: ints.get(a.name, a))
        source = n.args[0] if n.args and isinstance(n.args[0], fx.Node) else None
        outputs = [self.kepts.dims(ref) for ref in tree_leaves(refs[n.name]) if isinstance(ref, Ref)]
        first = refs[source.name] if source is not None else None
        return Call(
            n.target,
            args,
            kwargs,
            self.kepts.dims(first) if isinstance(first, Ref) else None,
            [dims for dims in outputs if dims is not None] if outputs and None not in outputs else None,
        )

    def _search(self, n: fx.Node, args: Any, kwargs: Any, changes: Changes, error: Exception | None) -> Changes:
        """The first changes that give the planned shape; those that give the recorded values as well come first."""
        fitting = None
        for trial_changes in (changes, *self._guesses(n, changes)):
            try:
                result = self._trial(*changed((n.target, args, kwargs), trial_changes))
            except Exception as failure:
                error = error or failure
                continue
            if as_planned(result, self.aligned.refs[n.name], self.kepts, 1e-3):
                return trial_changes
            if fitting is None and as_planned(result, self.aligned.refs[n.name], self.kepts):
                fitting = trial_changes
        if fitting is None:
            raise UserError(f"no numbers make its {n.name} run at the new sizes ({error})")
        return fitting

    def _guesses(self, n: fx.Node, changes: Changes) -> Iterator[Changes]:
        for path, value in literal_paths(n.args, n.kwargs):
            if path not in changes and value > 1:
                yield from ({**changes, path: new} for new in sorted(self.kepts.counts.get(value, ())) if new != value)

    def _trial(self, target: Any, args: Any, kwargs: Any) -> Any:
        """On copies: an attempt that fails must have changed nothing."""
        return self._execute(target, *tree_map_only(torch.Tensor, torch.clone, (args, kwargs)))

    def _execute(self, target: Any, args: Any, kwargs: Any) -> Any:
        return (self.call_method if isinstance(target, str) else self.call_function)(target, args, kwargs)


def _writes(n: fx.Node) -> bool:
    """Whether the call changes one of its arguments."""
    name = name_of(n.target)
    return "impure" in n.meta or name == "setitem" or name.endswith("_") or "out" in n.kwargs


def _get(args: Any, kwargs: Any, path: str) -> Any:
    """The value that an argument has now; None where there is none."""
    first, *rest = path.split(".")
    if first == "target":
        return None
    value = kwargs.get(rest.pop(0)) if first == "kwargs" else args[int(first)]
    for key in rest:
        value = getattr(value, key) if isinstance(value, slice) else value[int(key)]
    return value


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
