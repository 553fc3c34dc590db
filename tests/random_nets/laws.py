"""The law on one random model: masked and shrunk are the same function, and nothing masked stays without need."""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from dist_compress import speedup
from dist_compress.speedup import apply, verify
from dist_compress.target import Coupling
from random_nets.drawing import draw
from random_nets.masks import mask_groups, mask_slices
from random_nets.net import BATCH, RandomNet

TOLERANCE = 1e-9


class Broken(AssertionError):
    """A random model on which a law does not hold; the message names the seed."""


@dataclass(frozen=True)
class Outcome:
    """What happened to one model."""

    style: str  # slices | masks | groups | none: how it was masked
    before: int  # parameters
    after: int
    units: int  # of free groups that were masked: all of them had to go
    error: float


def check(seed: int) -> Outcome:
    """Draw, mask, plan, apply and compare on new inputs; raises Broken naming the seed and what is wrong."""
    try:
        return _check(seed)
    except Exception as error:
        raise Broken(f"check({seed}): {type(error).__name__}: {error}") from error


def _check(seed: int) -> Outcome:
    b, new_input = draw(seed)
    rng = random.Random(f"masks of {seed}")
    net, x = b.net, new_input(BATCH)
    style = rng.choice(("slices", "slices", "slices", "masks", "groups", "groups", "none"))
    settings: dict[str, Any] = {"norm": rng.choice(("keep", "keep", "exact"))}
    held = f"layers.{rng.randrange(len(net.layers))}"
    if rng.random() < 0.1 and any(True for _ in net.get_submodule(held).parameters()):
        settings["keep"] = (held,)
    round_to = rng.choice((1, 1, 1, 2, 4))
    coupling, units, masks = None, {}, None
    if style == "groups":
        coupling = speedup.coupling(net, (x,), **settings)
        units = mask_groups(net, coupling, rng)
    elif style != "none":
        mask_slices(b, rng)
    asked = net
    if style == "masks":  # the same masks as data, of weights that are not zero
        masks = {name: p != 0 for name, p in net.named_parameters()}
        asked = copy.deepcopy(net)
        for name, parameter in asked.named_parameters():
            parameter.data[~masks[name]] = 0.5
    state = copy.deepcopy(asked.state_dict())
    plan = speedup.plan(asked, (x,), masks=masks, round_to=round_to, **settings)
    unchanged = all(torch.equal(value, state[name]) for name, value in asked.state_dict().items())
    assert unchanged, "planning changed the model"
    kept = [fqn for fqn in plan.keep if f"{fqn}.".startswith(f"{held}.")] if "keep" in settings else []
    assert not kept, f"{kept} shrinks although it is to be kept"
    small = apply(copy.deepcopy(net), plan)
    errors = [0.0]
    for batch in (1, BATCH + 1):
        new = new_input(batch)
        with torch.no_grad():
            expected = net(new.clone())
            assert all(bool(t.isfinite().all()) for t in expected), "the masked model is not finite"
            errors.append(verify(expected, small(new.clone())))
    assert max(errors) <= TOLERANCE, f"masked and shrunk differ by {max(errors):.1e}"
    if coupling is not None and round_to == 1:
        _all_gone(units, coupling, plan)
    if rng.random() < 0.2:
        _replay(plan, net, small, new_input(BATCH))
    with torch.no_grad():  # autograd refuses some in-place steps of the drawn nets
        small.train()(new_input(BATCH + 1))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (net, small)]
    return Outcome(style, *sizes, sum(map(len, units.values())), max(errors))


def _replay(plan: speedup.Plan, net: RandomNet, small: RandomNet, x: torch.Tensor) -> None:
    """The plan out of its files makes the same model, from which a checkpoint that is cut by it differs in no shape."""
    with tempfile.TemporaryDirectory() as folder:
        plan.save(folder)
        again = speedup.Plan.load(folder)
    assert again.fingerprint() == plan.fingerprint(), "the saved plan is another one"
    twin = apply(copy.deepcopy(net), again)
    with torch.no_grad():
        assert all(map(torch.equal, twin(x.clone()), small(x.clone()))), "the saved plan makes another model"
    state, cut = small.state_dict(), speedup.apply_to_state(plan, net.state_dict())
    assert all(cut[name].shape == value.shape for name, value in state.items() if name in cut), "a checkpoint differs"


def _all_gone(units: dict[int, torch.Tensor], coupling: Coupling, plan: speedup.Plan) -> None:
    """Every unit of a free group that was masked is out of every parameter, unless all of its dim is dead."""
    last = {(b.fqn, b.dim) for b in plan.blocked if "last slice" in b.reason}
    for i, masked in units.items():
        group = coupling.groups[i]
        for member in group.members if not any((m.fqn, m.dim) in last for m in group.members) else ():
            kept = plan.keep.get(member.fqn, {}).get(member.dim)
            gone = member.index[masked]
            left = gone.flatten() if kept is None else kept[torch.isin(kept, gone)]
            assert not len(left), f"group {group.name} keeps {left.tolist()} of {member.fqn}"


def describe(seed: int) -> str:
    """The program of a model, a step a line, to see what `check(seed)` ran."""
    b, _ = draw(seed)
    names = {id(layer): f"layers.{i} {layer}" for i, layer in enumerate(b.net.layers)}
    lines = [f"input {b.values[0].dtype} {b.sizes(0)}"]
    value = 1
    for step, sources in b.net.program:
        text = names.get(id(step)) or getattr(step, "__name__", repr(step))
        lines.append(f"{value} = {text} of {', '.join(map(str, sources))} -> {b.sizes(value)}")
        value += 2 if getattr(getattr(step, "func", None), "__name__", "") in ("chunk", "halves") else 1
    return "\n".join([*lines, f"returns {b.net.returned}"])
