"""Tensors shaped like parameters of which every rank holds a part: whole again, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.exchange import Exchange, Span
from dist_compress.fingerprint import fingerprint_of, tensor_fingerprints
from dist_compress.layout import Layout, Run


@dataclass(frozen=True)
class Parts:
    """What this rank holds of some tensors, and who holds the rest: stays true when the model itself has changed."""

    tensors: dict[str, torch.Tensor]
    shapes: dict[str, torch.Size]
    holdings: dict[str, list[list[Run]]]  # the runs of every rank

    @classmethod
    def of(cls, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Parts:
        """`tensors`: {parameter: what this rank holds of a tensor that lies as the parameter does}. Local."""
        shapes = {name: layout.shape(name) for name in tensors}
        return cls(dict(tensors), shapes, {name: layout.holdings(name) for name in tensors})

    def whole(self, name: str) -> torch.Tensor:
        """One of them, in its shape, on every rank. Collective, unless every rank holds it."""
        return join(self.tensors[name], self.holdings[name], self.shapes[name])


def join(local: torch.Tensor, holdings: Sequence[Sequence[Run]], shape: torch.Size) -> torch.Tensor:
    """The whole tensor on every rank. Collective, unless every rank holds it."""
    num = shape.numel()
    if all(list(runs) == [(0, num)] for runs in holdings):
        return local
    exchange = Exchange({"": holdings}, [[Span("", 0, num)]] * comm.world_size())
    flat = local.reshape(-1)
    packed = flat.dtype == torch.bool
    return exchange.move(exchange.pick(lambda _: flat), lambda _: flat, packed)[0].view(shape)


def whole_fingerprint(layout: Layout, model: nn.Module) -> str:
    """`weights_fingerprint` of a model of which every rank holds a part, as if it were whole. Collective, one parameter
    after the other, unless every rank holds all of it."""
    first = {id(p): name for name, p in model.named_parameters()}
    names = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    parts = Parts.of(layout, {name: layout.local(name) for name in first.values()})
    marks: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        marks |= tensor_fingerprints({name: parts.whole(names[name]) if name in names else tensor})
    return fingerprint_of(marks)


def check_copies(layout: Layout, names: Sequence[str], step: int) -> None:
    """Raise RuntimeError on every rank unless those that hold the same parts of parameters hold the same bits: the
    replicas of HSDP. Collective, unless there are no names."""
    if not names:
        return
    own = fingerprint_of(tensor_fingerprints({name: layout.local(name) for name in names}))
    marks = comm.gather_object(own)
    first: dict[Any, int] = {}  # the first rank that holds these parts
    for r, mark in enumerate(marks):
        other = first.setdefault(tuple(tuple(layout.runs(name, r)) for name in names), r)
        if marks[other] != mark:
            raise RuntimeError(
                f"Ranks {other} and {r} hold the same parts of the weights with other bits at step {step}: their "
                f"fingerprints are {marks[other]!r} and {mark!r}. They no longer train one model."
            )


def gather_to_rank0(model: nn.Module, parts: Parts) -> None:
    """Give the meta parameters of `model` their values on rank 0, on its device; on the others they stay as they are.
    Collective, one after the other."""
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    first = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(first[id(parameter)], []).append((module, key))
    for name, where in places.items():
        value = parts.whole(name)
        if comm.rank() == 0:
            trained = model.get_parameter(name).requires_grad
            new = nn.Parameter(value.to(comm.device()), requires_grad=trained)
            for module, key in where:
                module._parameters[key] = new
