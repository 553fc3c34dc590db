"""Which calls of functions a model makes, and making modules (`functions.Call`) of those that a config list names.

    found = Found.of(sites)                     one run of the model
    expose(sites, {"add"}, {"attn.softmax_0"})  all calls of add, and that one, are modules from now on
    hide(model, keep)                           those that are no target after all are none again

Only modules of the model itself are looked into: of torch.nn those that hold others, not single layers such as
nn.Softmax, which are targets themselves. nn.MultiheadAttention runs in the open where one of its calls or its out_proj
is a target (dist_compress.multihead). Everything here is local and the same on every rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress import multihead
from dist_compress.errors import UserError
from dist_compress.functions import ATTENTION, FUNCTIONS, PARTS, AttentionCall, Call, Calls, Watched
from dist_compress.selection import type_name
from dist_compress.sites import Sites

_OPEN = "MultiheadAttention"
HIDDEN = "NonDynamicallyQuantizableLinear"  # the type of out_proj of nn.MultiheadAttention
_NAME = re.compile(rf"(?:.*\.)?({'|'.join(FUNCTIONS)})_\d+")


@dataclass(frozen=True)
class Place:
    """One call as it was seen."""

    name: str  # layer1.0.add_0
    owner: str  # layer1.0
    function: str  # add
    nums: tuple[int, ...]  # of calls of the function in the forwards of the owner; one, or it is no target


def open_attention(sites: Sites, entries: Sequence[Any]) -> None:
    """Let out_proj of each nn.MultiheadAttention run as a layer, if entries may mean it by type, name or pattern."""
    for name, module in sites.model.named_modules():
        if multihead.opens(module) and any(_may_mean(entry, _out_proj(name, module)) for entry in entries):
            _open(module, name)
            sites.forget()


def asked_for(entries: Sequence[Any], model: nn.Module) -> tuple[set[str], set[str]]:
    """The functions and the names of calls that a config list mentions; most mention none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    types = {type_name(module) for module in modules.values()}
    functions, names = set(), set()
    for entry in entries:
        for prefix in ("", "exclude_") if isinstance(entry, dict) else ():
            functions |= {v for v in _strings(entry, f"{prefix}op_types") if v in FUNCTIONS and v not in types}
            names |= {v for v in _strings(entry, f"{prefix}op_names") if _NAME.fullmatch(v) and v not in modules}
    return functions, names


def expose(sites: Sites, functions: Collection[str], names: Collection[str], key: str) -> None:
    """Make modules of all calls of `functions`, and of those of `names`. Raises UserError, which begins with `key`, for
    what the model does not call."""
    if not functions and not names:
        return
    places = find(sites)
    for wanted, known in ((functions, {p.function for p in places.values()}), (names, set(places))):
        for missing in sorted(set(wanted) - known):
            raise UserError(f"{key}: {missing!r} is no call that the model makes. {inventory(places.values())}")
    for place in places.values():
        if place.function in functions or place.name in names:
            put(sites.model, place, places)
    sites.forget()


def put(model: nn.Module, place: Place, places: dict[str, Place]) -> None:
    """Make a module of one call, and of the call it is a part of."""
    owner, _, name = place.name.rpartition(".")
    if owner in places:
        put(model, places[owner], places)
    module = model.get_submodule(owner)
    if isinstance(getattr(module, name, None), Call):
        return
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise UserError(
            f"{place.name}: {owner or 'the model'} is a {type(module).__name__} ({type(module).__mro__[1].__name__}), "
            "which runs whatever is put into it, so calls of its own cannot be targets. Derive it from nn.Module, or "
            "leave them out."
        )
    num, *others = place.nums
    if others:
        raise UserError(
            f"{place.name}: {owner or 'the model'} runs several times, and calls {place.function} {num} or "
            f"{others[-1]} times. By their number its calls cannot be told apart; leave them out, and name those "
            "of other modules by op_names."
        )
    if hasattr(module, name):
        raise UserError(
            f"{place.name} is a call of {place.function} and an attribute of {owner or 'the model'}. Rename the latter."
        )
    module.add_module(name, AttentionCall(num) if place.function == ATTENTION else Call(place.function, num))
    if not isinstance(module, Call):
        _open(module, owner)


def _open(module: nn.Module, name: str) -> None:
    if not isinstance(vars(module).get("forward"), Watched):
        Watched(module, name)


def hide(model: nn.Module, keep: Collection[str]) -> None:
    """Calls that neither are in `keep` nor hold one that is are no modules any more, and what is not needed for those,
    or for an out_proj in `keep`, runs as before."""
    for name, call in [*model.named_modules()][::-1]:
        if isinstance(call, Call) and name not in keep and not any(isinstance(m, Call) for m in call.children()):
            owner, _, own = name.rpartition(".")
            delattr(model.get_submodule(owner), own)
    for name, module in model.named_modules():
        watched = vars(module).get("forward")
        if isinstance(watched, Watched) and not watched.calls() and _out_proj(name, module) not in keep:
            watched.remove()


def describe(model: nn.Module) -> list[list[Any]]:
    """What `restore` needs: [name, function, number of calls] of each call that is a module, and [name,
    "MultiheadAttention", 0] of each of those that runs in the open."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Call):
            found.append([name, module.function, module.num_calls])
        elif isinstance(module, nn.MultiheadAttention) and isinstance(vars(module).get("forward"), Watched):
            found.append([name, _OPEN, 0])
    return found


def restore(model: nn.Module, described: Sequence[Sequence[Any]]) -> None:
    """Make modules of the calls that `describe` described, and open attention."""
    for name, function, num_calls in described:
        if function == _OPEN:
            _open(model.get_submodule(name), name)
            continue
        put(model, Place(name, name.rpartition(".")[0], function, (num_calls,)), {})


def inventory(places: Collection[Place]) -> str:
    """What there is, for messages."""
    if not places:
        return f"It calls none of {', '.join(FUNCTIONS)} on floating point tensors in a module's forward."
    by_function = {f: [p.name for p in places if p.function == f] for f in FUNCTIONS}
    listed = [f"{f} ({len(own)}: {_short(own)})" for f, own in by_function.items() if own]
    return f"It calls {'; '.join(listed)}."


def find(sites: Sites) -> dict[str, Place]:
    """All calls of the model on the example, by name, in the order of its modules. Raises UserError."""
    model = sites.model
    seen: dict[str, list[Counter[str]]] = {}
    watched = [_Look(module, name, seen) for name, module in model.named_modules() if _looked_into(module)]
    try:
        sites.run()
    finally:
        for look in watched:
            look.remove()
    return {place.name: place for look in watched for place in _places(look.where, seen.get(look.where, []))}


class _Look(Watched):
    """Counts the calls of a module's forward, and changes nothing."""

    def __init__(self, owner: nn.Module, where: str, seen: dict[str, list[Counter[str]]]) -> None:
        super().__init__(owner, where)
        self.seen = seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with Calls(self.owner, FUNCTIONS, lambda function, index, operands, run: run(*operands)) as mode:
            result = self.inner(*args, **kwargs)
        for call in self.calls().values():  # of an earlier `expose`; they do not come by here
            mode.counts[call.function] = call.num_calls
        self.seen.setdefault(self.where, []).append(Counter(mode.counts))
        return result


def _looked_into(module: nn.Module) -> bool:
    layer = type(module).__module__.startswith("torch.nn.") and not any(module.children())
    return not (layer or isinstance(module, Call | torch.jit.ScriptModule))


def _places(where: str, forwards: list[Counter[str]]) -> Iterator[Place]:
    prefix = f"{where}." if where else ""
    for function in FUNCTIONS:
        nums = sorted({counts[function] for counts in forwards})
        for index in range(max(nums, default=0)):
            name = f"{prefix}{function}_{index}"
            yield Place(name, where, function, tuple(nums))
            for part, inner in PARTS.items() if function == ATTENTION else ():
                yield Place(f"{name}.{part}", name, inner, (1,))


def _out_proj(name: str, module: nn.Module) -> str:
    """The name of the layer that nn.MultiheadAttention hides; "" of another module."""
    return f"{name}.out_proj".removeprefix(".") if isinstance(module, nn.MultiheadAttention) else ""


def _may_mean(entry: Any, layer: str) -> bool:
    if not isinstance(entry, dict):
        return False
    patterns = _strings(entry, "op_names_re")
    try:
        found = any(re.match(pattern, layer) for pattern in patterns)
    except re.error:  # said when the entry is checked
        found = False
    return found or HIDDEN in _strings(entry, "op_types") or layer in _strings(entry, "op_names")


def _strings(entry: dict[str, Any], key: str) -> list[str]:
    value = entry.get(key)
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
