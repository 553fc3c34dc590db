"""From masked weights to a plan: dead = exact zeros, then the keep fixpoint, constants, and a rehearsal.

Every plan is rehearsed. What the module of python code that holds a size of its own touches is kept in the next round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup import sets
from dist_compress.speedup.attributes import attributes
from dist_compress.speedup.capture import Capture, Reference, captured
from dist_compress.speedup.constraints import pin_modules
from dist_compress.speedup.custom import resized
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.fold import close_constants
from dist_compress.speedup.gains import close_gains
from dist_compress.speedup.graph_fallback import Fallback
from dist_compress.speedup.keep import Keep
from dist_compress.speedup.masking import Masks, check_masks
from dist_compress.speedup.model_config import config_changes
from dist_compress.speedup.norms import NormModule
from dist_compress.speedup.plan import Blocked, Plan
from dist_compress.speedup.propagation import propagate
from dist_compress.speedup.rehearsal import rehearse
from dist_compress.speedup.rules import rule_of
from dist_compress.speedup.settings import Settings
from dist_compress.speedup.structure import Structure
from dist_compress.speedup.swaps import narrow, nested_encoders, swaps
from dist_compress.tracing import Ref
from dist_compress.tracing.walk import buffers_of, modules_of, parameters_of


def plan(
    model: nn.Module | Capture,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    masks: Masks | None = None,
    round_to: int = 1,
    norm: str = "keep",
    keep: Iterable[str] = (),
    barrier: Iterable[str] = (),
    fold: bool = True,
) -> Plan:
    """The plan that removes what the zeros of `model` allow, exactly. Rank 0 only; broadcast the result.

    `model`: unwrapped; it is left as it was. `args`, `kwargs`: an example input; a small one makes planning quick.
    A `Capture` (of an earlier `coupling`) holds model, input and settings, and saves the work that it has done.
    masks {parameter fqn: bool tensor broadcastable to it, True = keep}: the weights count as multiplied by them;
    without, the exact zeros of the weights are the masks. Kept counts of shrinking dims are multiples of `round_to`.
    `norm`, `keep`, `barrier` as in `capture`. `fold`: slices that hold a constant may go, if a bias takes its effect;
    False where the model computes with other values than those in it. Zero slices that have to stay are in
    `Plan.blocked`, with the op that keeps them.
    """
    given = captured(model, args, kwargs, {"norm": norm, "keep": tuple(keep), "barrier": tuple(barrier)})
    Settings(round_to=round_to)
    checked = check_masks(given.model, masks) if masks is not None else {}
    if any(parameter.is_meta for parameter in parameters_of(modules_of(given.model)).values()):
        if masks is None:
            raise UserError("plan: this model is on the meta device, so its weights have no zeros; give masks={...}.")
        return solve(given, given.model, given.structure, propagate(given.trace, checked), round_to, fold)
    reference = Reference(given, checked)
    made = _by_masks(reference, round_to, fold)
    if made is not None:
        return made
    structure = reference.structure
    return solve(given, reference.model, structure, propagate(structure.trace), round_to, fold)


def _by_masks(reference: Reference, round_to: int, fold: bool) -> Plan | None:
    """The plan that needs values only where constants leak, or None when it is not that easy.

    Then code holds sizes of its own, or looks at the weights, and `solve` finds out what to do.
    """
    given = reference.given
    s = given.structure
    facts = propagate(given.trace, reference.masks, reference.values, zeros=True, stays=s.stays)
    keep = Keep(s, facts, {}, round_to)
    model = reference.model if reference.made else given.model
    bias = _values(s, facts, keep, model, fold)
    if bias and not reference.made:  # they hold masked weights
        bias = _values(s, facts, keep, reference.model, fold)
    made = _extract(given, s, facts, keep, model, bias)
    made.config = config_changes(model, made)
    del facts  # they may hold the values of all tensors
    if not made.keep:
        return Plan(blocked=made.blocked)
    return made if s.settings.norm != "plain" and verified(reference, made, keep) else None


def verified(reference: Reference, made: Plan, keep: Keep) -> bool:
    """Whether the shrunk model runs as planned and gives what the masked model gives."""
    run = reference.run
    return run is not None and rehearse(reference.given, reference.model, made, run, keep, compare=True) is None


def solve(
    given: Capture, model: nn.Module, s: Structure, facts: Facts, round_to: int = 1, fold: bool = True
) -> Plan:
    """The plan of what is dead by `facts`, with everything kept that does not run or, where values are known, differs.

    `model`: the captured one, or a copy with other weights, whose output the shrunk one must give.
    """
    banned: set[str] = set()
    compare = facts.masks is None
    fallback = Fallback(model, s, (given.args, given.kwargs), compare)
    while True:
        keep = Keep(s, facts, pin_modules(s, banned), round_to)
        bias = _values(s, facts, keep, model, fold)
        made = _extract(given, s, facts, keep, model, bias)
        if not made.keep:
            return Plan(blocked=made.blocked)
        made.graphs = fallback.rewrites(made, keep)
        made.config = config_changes(model, made)
        failed = rehearse(given, model, made, s, keep, compare)
        if failed is None and not fallback.holds_at_another_batch(made):
            continue
        if failed is None and s.settings.norm == "plain":
            made = replace(made, swaps=narrow(made.swaps))
            made.config = config_changes(model, made)
            failed = rehearse(given, model, made, s, keep, compare=False)
        if failed is None:
            return made
        culprits = _culprit(failed, banned, s, keep, model)
        banned |= culprits - fallback.choose(culprits, made, keep)


def outline(s: Structure, facts: Facts, model: nn.Module) -> Plan:
    """What `solve` would slice and keep if the shrunk model surely runs: no integers, nothing to be applied."""
    keep = Keep(s, facts, {})
    _values(s, facts, keep, model)
    kept = _slices(s, keep)
    return Plan(kept, blocked=_blocked(s, facts, keep), shapes=_shapes(s, kept))


def _values(
    s: Structure, facts: Facts, keep: Keep, model: nn.Module, fold: bool = True
) -> dict[str, torch.Tensor]:
    """New values of biases and gains, once all that would need others is kept."""
    while True:
        bias = close_constants(s, facts, keep, model, fold)
        size = keep.size()
        gains = close_gains(s, keep, model)
        if keep.size() == size:
            return bias | gains


def _extract(
    given: Capture, s: Structure, facts: Facts, keep: Keep, model: nn.Module, bias: dict[str, torch.Tensor]
) -> Plan:
    kept = _slices(s, keep)
    modules = modules_of(model)
    kept = {fqn: kept[fqn] for fqn in (*parameters_of(modules), *buffers_of(modules)) if fqn in kept}
    exchanged = swaps(model, kept, _normalised(s, keep))
    attrs = attributes(s, keep, model, lambda: given.uses) | nested_encoders(model, exchanged)
    blocked, cut = _blocked(s, facts, keep), resized(s, lambda var: keep.kept[var])
    return Plan(kept, attrs, bias, blocked, _shapes(s, kept), exchanged, cut)


def _slices(s: Structure, keep: Keep) -> dict[str, dict[int, torch.Tensor]]:
    """{fqn of a parameter or buffer that shrinks: {dim: kept index}}."""
    kept: dict[str, dict[int, torch.Tensor]] = {}
    index = {var: keep.kept[var].nonzero().flatten() for var in keep.shrunk()}
    for key in s.known():
        info = s.trace.info(Ref(key))
        if info.kind in ("param", "buffer"):
            dims = {d: index[var] for d, var in enumerate(s.dims(Ref(key))) if var in index}
            if dims:
                kept.update((fqn, dims) for fqn in info.all_fqns)
    return kept


def _shapes(s: Structure, kept: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """{fqn: shape} of some parameters and buffers."""
    shapes = {fqn: info.shape for key in s.known() for info in (s.trace.info(Ref(key)),) for fqn in info.all_fqns}
    return {fqn: shapes[fqn] for fqn in kept}


def _normalised(s: Structure, keep: Keep) -> dict[str, int]:
    """{fqn of a leaf norm whose normalised dim shrinks: its kept positions}."""
    found = {}
    for op in s.trace.tape:
        rule = rule_of(op)
        if isinstance(rule, NormModule) and op.inputs[0].id in s.known():
            kept = keep.kept[s.dims(op.inputs[0])[rule.formula.axis]]
            if not bool(kept.all()):
                found[op.module] = int(kept.sum())
    return found


def _blocked(s: Structure, facts: Facts, keep: Keep) -> list[Blocked]:
    """Zero slices of weights that stay, by reason."""
    found = []
    for key in s.known():
        info = s.trace.info(Ref(key))
        if info.kind != "param" or len(info.shape) < 2:
            continue
        nonzero = facts.nonzero(Ref(key))
        if sets.is_all(nonzero):
            continue
        for d, var in enumerate(s.dims(Ref(key))):
            if nonzero.size(d) == 1 and bool(nonzero.any()):
                continue
            some = sets.any_over(nonzero, [o for o in range(nonzero.dim()) if o != d]).reshape(-1)
            asked = ~some.expand(info.shape[d]) & keep.kept[var]
            if not bool(asked.any()):
                continue
            causes = keep.cause[var][asked]
            for cause in causes.unique().tolist():
                found.append(Blocked(info.fqn, d, int((causes == cause).sum()), keep.reasons[cause]))
    return found


def _culprit(failed: str, banned: set[str], s: Structure, keep: Keep, model: nn.Module) -> set[str]:
    """The modules to keep whole: the innermost user module around `failed` that changes anything, else all."""
    name = failed
    while True:
        builtin = type(model.get_submodule(name)).__module__.startswith("torch.nn.")
        pins = pin_modules(s, {name})
        if not builtin and not keep.shrunk().isdisjoint(pins):
            return {name}
        if not name:
            return {op.module for op in s.trace.tape}
        name = name.rpartition(".")[0]
