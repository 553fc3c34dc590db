"""Modules whose `forward` is a recorded graph with other numbers in it: what `apply` does with `Plan.graphs`.

Only `forward` changes. Parameters, buffers, children, hooks, attributes, methods and the training flag of the module
are its own as before, so the keys of its state dict are as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect
from torch.utils._pytree import tree_leaves, tree_map_only

from dist_compress.errors import UserError
from dist_compress.speedup.graph_align import Program, program_of
from dist_compress.speedup.graph_literals import changed
from dist_compress.speedup.plan import GraphRewrite, Plan


class GraphForward(nn.Module):
    """Mixed into the class of a module whose `forward` is `rewritten_graph`."""

    rewritten_graph: fx.Graph


def programs(model: nn.Module, plan: Plan) -> dict[str, Program]:
    """The graphs of the modules in `plan.graphs`, recorded on the model as it was before anything is sliced. Local.

    Nothing changes. Raises UserError when a module cannot be recorded or is not the one that was planned.
    """
    return {fqn: _program(model, fqn, rewrite) for fqn, rewrite in plan.graphs.items()}


def install(model: nn.Module, plan: Plan, recorded: dict[str, Program]) -> None:
    """Rewrite the graphs and run them in place of the modules' own code, once the tensors are sliced."""
    for fqn, program in recorded.items():
        module = model.get_submodule(fqn)
        _rewrite(program.graph, plan.graphs[fqn].rewrites)
        if isinstance(module, fx.GraphModule):
            module.recompile()
        else:
            run_graph(module, program)


def run_graph(module: nn.Module, program: Program) -> None:
    """From now on `module(...)` runs the program. Its tensors come along as buffers that are not saved."""
    _expect_recorded(program.graph, type(module).__name__)
    code = program.graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<graph of {type(module).__name__}>", "exec"), names)
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor):
            module.register_buffer(name, value, persistent=False)
        else:
            setattr(module, name, value)
    cls = type(module)
    body = {"forward": names["forward"], "rewritten_graph": program.graph, "__module__": cls.__module__}
    module.__class__ = type(cls.__name__, (GraphForward, cls), body)


def expect(value: Any, recorded: Any, name: str, module: str) -> None:
    """Raises UserError when an argument that the graph does not look at is not what it was."""
    if type(value) is not type(recorded) or value != recorded:
        raise UserError(
            f"{module} runs as a graph that was recorded with {name}={recorded!r}, and was now called with "
            f"{type(value).__name__} {value if type(value) in (bool, float, str) else ''}. Make the plan on an example "
            "that calls it as it will be used."
        )


has_side_effect(expect)


def _expect_recorded(graph: fx.Graph, module: str) -> None:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1] if inputs else None):
        for node in inputs:
            if "recorded" in node.meta and not isinstance(node.meta["recorded"], torch.device):
                graph.call_function(expect, (node, node.meta["recorded"], str(node.target), module))


def _program(model: nn.Module, fqn: str, rewrite: GraphRewrite) -> Program:
    try:
        module = model.get_submodule(fqn)
        inputs = _like(module, rewrite.inputs)
        program = program_of(module, inputs, [model.get_submodule(name) for name in rewrite.calls])
    except (AttributeError, UserError) as error:
        raise UserError(
            f"The speedup plan does not fit this model: module {fqn!r} cannot be recorded as it was ({error}). "
            "Apply a plan to the architecture it was made for, before anything is shrunk."
        ) from error
    if program.structure() != rewrite.structure:
        raise UserError(
            f"The speedup plan does not fit this model: module {fqn!r} runs another program than the one that was "
            "planned. Use the versions of the model's code and of its libraries that the plan was made with."
        )
    return program


def _like(module: nn.Module, inputs: Any) -> Any:
    """The inputs on the device of the module, and of its floating dtype if theirs is uniform but another."""
    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtypes = {leaf.dtype for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
    if own is None:
        return inputs
    dtype = own.dtype if len(dtypes) == 1 else None

    def move(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.to(own.device, dtype if leaf.is_floating_point() else None)

    return tree_map_only(torch.Tensor, move, inputs)


def _rewrite(graph: fx.Graph, rewrites: dict[str, dict[str, Any]]) -> None:
    for node in graph.nodes:
        if node.name in rewrites:
            node.target, node.args, node.kwargs = changed((node.target, node.args, node.kwargs), rewrites[node.name])
