"""Masked against shrunk on inputs nobody has seen, in float64 where the models run in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup.first_difference import first_difference
from dist_compress.speedup.fresh import Inputs, cast, run, variants
from dist_compress.speedup.masking import duplicate
from dist_compress.speedup.plan import Plan
from dist_compress.tracing.verify import verify


@dataclass(frozen=True)
class Verified:
    """What the comparison of the masked with the shrunk model found."""

    difference: float  # the largest, relative to the largest value of the masked model's output; nan: none made
    dtype: torch.dtype | None  # both were run in; None: each in its own
    inputs: tuple[str, ...]  # what was compared
    refused: tuple[str, ...]  # inputs on which the masked model itself does not run


def compare(masked: nn.Module, small: nn.Module, plan: Plan, inputs: Inputs, tolerance: float = math.inf) -> Verified:
    """Run both models, which stay as they are, on the example `inputs` and on inputs like it. Local.

    Raises UserError naming the first op that differs where the outputs differ by more than `tolerance`. Models that run
    in nothing wider than float32 are allowed its rounding.
    """
    if any(parameter.is_meta for parameter in masked.parameters()):
        return Verified(math.nan, None, (), ("a model on the meta device",))
    dtype, one, other = _twins(masked, small, inputs)
    if dtype is None:
        floats = [p.dtype for p in masked.parameters() if p.is_floating_point()]
        tolerance = max([tolerance, *(1e3 * torch.finfo(d).eps for d in floats)])
    worst, ran, refused = 0.0, [], []
    for name, fresh in variants(inputs):
        fresh = cast(fresh, dtype) if dtype is not None else fresh
        try:
            expected = run(one, fresh)
        except Exception:
            if name == "the example":
                raise
            refused.append(name)
            continue
        difference = verify(expected, _output(other, fresh, name))
        worst = max(worst, difference)
        ran.append(name)
        if not difference <= tolerance:
            where = first_difference(one, other, plan, fresh, tolerance)
            raise UserError(
                f"speedup: masked and shrunk model differ by {difference:.3g} (relative; tolerance={tolerance:g}) on "
                f"{name}. The first difference is {where}. A branch or a size there depends on values, or a registered "
                "rule is wrong: name its module in barrier=[...], or correct the rule."
            )
    return Verified(worst, dtype, tuple(ran), tuple(refused))


def difference(masked: nn.Module, small: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The largest `verify` of two models on the example, on fresh inputs and at another batch size. Local."""
    return compare(masked, small, Plan(), (tuple(args), kwargs)).difference


def _twins(masked: nn.Module, small: nn.Module, inputs: Inputs) -> tuple[torch.dtype | None, nn.Module, nn.Module]:
    """Copies of both in float64 if they run in it, else they themselves."""
    try:
        one, other = duplicate(masked).double(), duplicate(small).double()
        run(one, cast(inputs, torch.float64))
        run(other, cast(inputs, torch.float64))
    except Exception:  # code that makes tensors of a type of its own
        return None, masked, small
    return torch.float64, one, other


def _output(small: nn.Module, inputs: Inputs, name: str) -> Any:
    try:
        return run(small, inputs)
    except Exception as error:
        raise UserError(
            f"speedup: the masked model runs on {name}, the shrunk one fails with {type(error).__name__}: {error}. "
            "Name the module where that happens in barrier=[...]."
        ) from error
