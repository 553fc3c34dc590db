"""The state of an optimizer by parameter name, because after a shrink or at another number of ranks the parameters are
other objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Names = Mapping[torch.Tensor, str]  # the trained parameters in the optimizer's order
State = dict[str, dict[str, Any]]
Transform = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def state_by_name(optimizer: torch.optim.Optimizer, names: Names) -> State:
    """{parameter name: {key: tensor or plain value}}; the tensors are the live ones. Local."""
    return {names[p]: dict(state) for p, state in optimizer.state.items()}


def transformed(state: State, transform: Transform) -> State:
    """`state` with `transform({parameter name: tensor})` applied to each kind of moment; scalars stay.
    Local."""
    out: State = {name: {k: v for k, v in values.items() if not is_moment(v)} for name, values in state.items()}
    for key in dict.fromkeys(k for values in state.values() for k in values):
        moments = {n: values[key] for n, values in state.items() if is_moment(values.get(key))}
        for name, moment in transform(moments).items():
            out[name][key] = moment
    return out


def is_moment(value: Any) -> bool:
    """Whether it is shaped like its parameter; the rest (counts of steps) is one number."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def each_moment(state: State, change: Callable[[str, torch.Tensor], torch.Tensor]) -> State:
    """`state` with `change(parameter name, tensor)` in the place of every moment; scalars stay."""
    return {
        name: {key: change(name, value) if is_moment(value) else value for key, value in values.items()}
        for name, values in state.items()
    }


def load_by_name(optimizer: torch.optim.Optimizer, names: Names, state: State) -> None:
    """Put a saved (or sliced) state into a new optimizer. Local. Every name and shape must fit."""
    packed = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {names[p]: i for i, p in enumerate(order)}
    packed["state"] = {index[name]: values for name, values in state.items()}
    optimizer.load_state_dict(packed)  # casts to each parameter's device and dtype
