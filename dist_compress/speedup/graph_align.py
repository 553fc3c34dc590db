"""The recorded graph of one submodule beside the tape of the whole model: which node made which of its tensors.

The graph is interpreted once on the arguments that the submodule got in the run. Its ATen ops are found again in the
tape, in the same order, with the same plain arguments; so every tensor of every node has a `Ref`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from dist_compress.errors import UserError
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import ModuleCall, Op, Ref, Trace, trace
from dist_compress.tracing.recorder import concrete_trace
from dist_compress.tracing.trace import current_ref
from dist_compress.tracing.untouched import untouched

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Program:
    """The graph of a module, and what it names that is not the module's own."""

    graph: fx.Graph
    constants: dict[str, Any]

    def structure(self) -> str:
        """A hash of the nodes: their names, what they call, and what they take from one another."""
        lines = []
        for node in self.graph.nodes:
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            lines.append(f"{node.op} {node.name} {target} {[n.name for n in node.all_input_nodes]}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Aligned:
    """A program whose nodes are known to the tape."""

    program: Program
    inputs: Inputs
    input_refs: Any  # like `inputs`, a Ref (or None) for each tensor
    refs: dict[str, Any]  # node name -> like its output, a Ref (or None) for each tensor
    ints: dict[str, int]  # node name -> the integer it computed


def program_of(module: nn.Module, inputs: Inputs, calls: Iterable[nn.Module]) -> Program:
    """A user's graph module is its own program; any other is recorded, with the modules in `calls` as one node each.

    Raises UserError when the module cannot be recorded.
    """
    if isinstance(module, fx.GraphModule):
        return Program(module.graph, {})
    whole = {id(call) for call in calls}
    recorded = concrete_trace(module, *_with_defaults(module, inputs), leaves=lambda m: id(m) in whole)
    constants = {}
    for node in recorded.graph.nodes:
        if node.op in ("get_attr", "call_module") and not _resolves(module, str(node.target)):
            constants[str(node.target)] = value = _attribute(recorded, str(node.target))
            if isinstance(value, nn.Module | nn.Parameter):
                raise UserError(f"it uses a {type(value).__name__} that it does not register")
    return Program(recorded.graph, constants)


def _with_defaults(module: nn.Module, inputs: Inputs) -> Inputs:
    """With the plain arguments that the call left out, so that the graph can be called with them."""
    args, kwargs = inputs
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    left_out = [p for i, p in enumerate(named) if p.name not in kwargs and (p.kind is p.KEYWORD_ONLY or i >= len(args))]
    plain = (type(None), bool, float, str)
    return args, {**kwargs, **{p.name: p.default for p in left_out if type(p.default) in plain}}


def calls_of(model: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, Inputs]:
    """The arguments of the first call of each submodule in one run of the model; not of one that is not called."""
    found: dict[str, Inputs] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in found:
                found[name] = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))

        return hook

    if "" in names:
        found[""] = (tuple(inputs[0]), dict(inputs[1]))
    handles = [model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in names if n]
    try:
        if handles:
            with untouched(model):
                model(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def align(names: set[str], module: nn.Module, program: Program, inputs: Inputs, s: Structure) -> Aligned:
    """`names`: those of the module and of its submodules on the tape.

    Raises UserError when the graph's ops are not those that the tape has inside the module.
    """
    watched = _Watched(module, program)
    inputs = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)
    leaves = {id(op.target.module) for op in s.trace.tape if isinstance(op.target, ModuleCall)}
    again = trace(watched, *inputs, leaves=lambda m: id(m) in leaves)
    inside = [op for op in s.trace.tape if op.module in names]
    found = _match(again, s.trace, inside)

    def whole(tree: Any) -> Any:
        return tree_map(lambda leaf: found.get(leaf.id) if isinstance(leaf, Ref) else None, tree)

    refs = {node: whole(tree) for node, tree in watched.refs.items()}
    return Aligned(program, inputs, whole(watched.input_refs), refs, watched.ints)


class Interpreter(fx.Interpreter):
    """Runs a program with the parameters and submodules of `module`."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, graph=program.graph, garbage_collect_values=False)
        self.program = program

    def fetch_attr(self, target: str) -> Any:
        if target in self.program.constants:
            return self.program.constants[target]
        return _attribute(self.module, target)

    def run_with(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As the module would be called."""
        return self.run(*_placeholders(self.program.graph, args, kwargs), enable_io_processing=False)


class _Watched(nn.Module):
    """Notes the Ref of every tensor of every node, while it is traced."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__()
        self.module = module
        self.runner = _WatchedInterpreter(module, program)
        self.refs, self.ints = self.runner.refs, self.runner.ints
        self.input_refs: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.input_refs = _refs((args, kwargs))
        return self.runner.run_with(args, kwargs)


class _WatchedInterpreter(Interpreter):
    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(module, program)
        self.refs: dict[str, Any] = {}
        self.ints: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.refs[n.name] = _refs(result)
        if type(result) is int:
            self.ints[n.name] = result
        return result


def _refs(tree: Any) -> Any:
    return tree_map(lambda leaf: current_ref(leaf) if isinstance(leaf, torch.Tensor) else None, tree)


def _placeholders(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The values of the placeholders, in order."""
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if type(graph._codegen) is not CodeGen:  # of torch.export: flat
        return tree_leaves((args, kwargs))
    defaults = {str(n.target): n.args[0] for n in graph.nodes if n.op == "placeholder" and n.args}
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    return [given[name] for name in names]


def _match(part: Trace, whole: Trace, inside: list[Op]) -> dict[int, Ref]:
    """{Ref of `part`: Ref of `whole`}; ops of `whole` that `part` does not need are passed over."""
    found: dict[int, Ref] = {}
    position = 0
    for op in part.tape:
        while position < len(inside):
            candidate, position = inside[position], position + 1
            pairs = _pairs(op, candidate, part, whole, found)
            if pairs is not None:
                found |= pairs
                break
        else:
            raise UserError(f"its recorded graph runs {op.name} where the module does not")
    return found


def _pairs(a: Op, b: Op, part: Trace, whole: Trace, found: dict[int, Ref]) -> dict[int, Ref] | None:
    """The Refs that stand for each other when `a` is `b`; None when it is not."""
    if a.target != b.target or len(a.outputs) != len(b.outputs):
        return None
    left, right = tree_leaves((a.args, a.kwargs)), tree_leaves((b.args, b.kwargs))
    if len(left) != len(right):
        return None
    pairs: dict[int, Ref] = {}
    for x, y in zip([*left, *a.outputs], [*right, *b.outputs], strict=True):
        if isinstance(x, Ref) and isinstance(y, Ref):
            one, other = part.info(x), whole.info(y)
            if (one.shape, one.dtype) != (other.shape, other.dtype) or found.get(x.id, y) != y:
                return None
            if (one.kind in ("param", "buffer")) != (other.kind in ("param", "buffer")) and one.kind != "input":
                return None
            pairs[x.id] = y
        elif type(x) is not type(y) or repr(x) != repr(y):
            return None
    return pairs


def _resolves(module: nn.Module, target: str) -> bool:
    try:
        _attribute(module, target)
    except AttributeError:
        return False
    return True


def _attribute(module: Any, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module
