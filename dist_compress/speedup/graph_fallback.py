"""Which modules run as rewritten graphs: those whose python code holds a size of its own, as far as that is exact.

When a rehearsal fails in a module, it and its siblings of the same class are recorded and found again on the tape;
those whose own code does not run at the new sizes get new numbers. What cannot be rewritten is kept whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from dist_compress.errors import UserError
from dist_compress.speedup.apply import apply
from dist_compress.speedup.cost import resize_batch
from dist_compress.speedup.graph_align import Aligned, Inputs, align, calls_of, program_of
from dist_compress.speedup.graph_repair import Kepts, as_planned, repair, sliced_inputs
from dist_compress.speedup.keep import Keep
from dist_compress.speedup.plan import GraphRewrite, Plan, encode
from dist_compress.speedup.structure import Structure
from dist_compress.tracing.copies import copied, tensors_of
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.verify import verify

_TOLERANCE = 1e-3  # of one module, in its own dtype; the rehearsal of the whole model is the judge


class Fallback:
    """The modules of one plan in the making that run as graphs. `compare`: as in `rehearse`."""

    def __init__(self, model: nn.Module, s: Structure, inputs: Inputs, compare: bool) -> None:
        self.model, self.structure, self.inputs, self.compare = model, s, inputs, compare
        self.chosen: dict[str, tuple[Aligned, tuple[str, ...]]] = {}  # fqn -> (program, modules that stay calls)
        self.refused: dict[str, str] = {}  # fqn -> why

    def choose(self, names: set[str], plan: Plan, keep: Keep) -> set[str]:
        """Those of the modules `names` that are to be graphs from now on, and siblings that have the same trouble.

        One that is a graph already failed as such, and is refused.
        """
        for name in names & set(self.chosen):
            self._refuse(name, "its graph gives another result")
        asked = names - set(self.refused)
        candidates = asked | (self._siblings(asked) - set(self.refused) - set(self.chosen))
        if not asked or any(p.is_meta for p in self.model.parameters()):
            return set()
        kepts = self._kepts(keep)
        small = shrunk(self.model, replace(plan, graphs={}))
        for name, inputs in calls_of(self.model, candidates, self.inputs).items():
            try:
                found = self._record(name, inputs, {*plan.swaps, *plan.resized})
            except (UserError, TypeError) as error:
                self.refused[name] = str(error)
                continue
            if name in asked or not _runs(found[0], small.get_submodule(name), kepts):
                self.chosen[name] = found
        return asked & set(self.chosen)

    def rewrites(self, plan: Plan, keep: Keep) -> dict[str, GraphRewrite]:
        """What `plan.graphs` has to be; without the modules for which there are no numbers."""
        kepts, found = self._kepts(keep), {}
        small = shrunk(self.model, plan) if self.chosen else self.model
        for name, (aligned, calls) in list(self.chosen.items()):
            try:
                numbers = repair(aligned, small.get_submodule(name), kepts)
            except Exception as error:  # the interpreter runs the user's code
                self._refuse(name, str(error).partition("\n")[0])
                continue
            if numbers:
                own = isinstance(self.model.get_submodule(name), fx.GraphModule)  # is not recorded again
                inputs = ((), {}) if own else aligned.inputs
                found[name] = GraphRewrite(inputs, aligned.program.structure(), numbers, calls)
        return found

    def holds_at_another_batch(self, plan: Plan) -> bool:
        """Whether the graphs follow the batch as the model does; if not they are refused."""
        if not plan.graphs or not self.compare:
            return True
        tensors = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        size = tensors[0].size(0) + 1 if tensors else 1
        args, kwargs = resize_batch(self.inputs, size)
        try:
            with untouched(self.model):
                expected = self.model(*args, **kwargs)
        except Exception:  # the model itself is bound to its batch
            return True
        try:
            small = shrunk(self.model, plan)
            with untouched(small):
                holds = verify(expected, small(*args, **kwargs)) <= _TOLERANCE
        except Exception:
            holds = False
        for name in () if holds else plan.graphs:
            self._refuse(name, "its graph is bound to the batch size of the example")
        return holds

    def _refuse(self, name: str, why: str) -> None:
        self.refused[name] = why
        del self.chosen[name]

    def _kepts(self, keep: Keep) -> Kepts:
        return Kepts(self.structure, keep, self.structure.trace.values if self.compare else {})

    def _siblings(self, names: set[str]) -> set[str]:
        classes = {type(self.model.get_submodule(name)) for name in names if name}
        ran = {op.module for op in self.structure.trace.tape}
        return {name for name, module in self.model.named_modules() if name in ran and type(module) in classes}

    def _record(self, name: str, inputs: Inputs, exchanged: set[str]) -> tuple[Aligned, tuple[str, ...]]:
        """With the submodules as calls where that can be, so that they keep their own code; else with all inlined."""
        module = self.model.get_submodule(name)
        parts = set(module.modules())  # one that is shared goes by a name elsewhere
        names = {fqn for fqn, part in self.model.named_modules() if part in parts}
        if isinstance(module, fx.GraphModule):
            return align(names, module, program_of(module, inputs, []), inputs, self.structure), ()
        encode(inputs, name, {})  # what cannot be stored cannot be recorded again
        prefix = f"{name}." if name else ""
        inside = {n for n in exchanged if n.startswith(prefix) and n != name}
        error: UserError | None = None
        for calls in (_called(module, prefix), tuple(sorted(inside))):
            try:
                program = program_of(module, inputs, [self.model.get_submodule(call) for call in calls])
                return align(names, module, program, inputs, self.structure), calls
            except UserError as failure:
                error = failure
        assert error is not None
        raise error


def shrunk(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy with the plan applied; tensors that stay whole are not copied."""
    return apply(copied(model, tensors_of(model)), plan)


def _called(module: nn.Module, prefix: str) -> tuple[str, ...]:
    """The names of the outermost submodules that can be called."""
    names: list[str] = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            names += _called(child, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return tuple(names)


def _runs(aligned: Aligned, module: nn.Module, kepts: Kepts) -> bool:
    """Whether the shrunk module's own code gives what is planned."""
    args, kwargs = sliced_inputs(aligned, kepts)
    try:
        with untouched(module):
            result: Any = module(*args, **kwargs)
    except Exception:
        return False
    output = next(node for node in aligned.program.graph.nodes if node.op == "output")
    return as_planned(result, aligned.refs[output.name], kepts, _TOLERANCE)
