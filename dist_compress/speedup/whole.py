"""Masks in, a smaller and proven model out: plan, apply and verify in one call, on a copy."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup.apply import apply
from dist_compress.speedup.capture import Capture, captured
from dist_compress.speedup.compare import Verified, compare
from dist_compress.speedup.cost import macs, num_params
from dist_compress.speedup.masking import Masks, check_masks, duplicate, masked
from dist_compress.speedup.plan import Blocked, Plan
from dist_compress.speedup.planning import plan


@dataclass(repr=False)
class Report:
    """What `speedup` did. `macs` are of the example as it is; None where the model cannot be counted."""

    parameters: tuple[int, int]  # before, after
    macs: tuple[int, int] | None
    verified: Verified
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)  # by phase

    @property
    def difference(self) -> float:
        """max|shrunk - masked| / max|masked|, the largest of all inputs; nan on the meta device."""
        return self.verified.difference

    @property
    def kept(self) -> list[Blocked]:
        """Zero slices that had to stay, and why."""
        return self.plan.blocked

    def lines(self) -> Iterator[tuple[str, str]]:
        """(what, value) for people."""
        yield "parameters", change(self.parameters)
        if self.macs is not None:
            yield "MACs", change(self.macs)
        verified = self.verified
        if verified.inputs:
            dtype = f" in {str(verified.dtype).removeprefix('torch.')}" if verified.dtype else ""
            yield "difference", f"{verified.difference:.1e}{dtype} ({', '.join(dict.fromkeys(verified.inputs))})"
        if verified.refused:
            yield "not compared", f"{', '.join(verified.refused)}: the masked model does not run on it"
        yield "seconds", ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.seconds.items())
        for blocked in self.kept:
            yield "kept", f"{blocked.count} zero slices of {blocked.fqn} dim {blocked.dim}: {blocked.reason}"

    def __str__(self) -> str:
        return "\n".join(f"{what:<13} {value}" for what, value in self.lines())

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> Table:
        table = Table(show_header=False, box=None)
        for what, value in self.lines():
            table.add_row(what, Text(value))
        return table


def speedup(
    model: nn.Module | Capture,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    masks: Masks | None = None,
    round_to: int = 1,
    norm: str = "keep",
    keep: Iterable[str] = (),
    barrier: Iterable[str] = (),
    tolerance: float = 1e-5,
) -> tuple[nn.Module, Report]:
    """(a smaller copy of `model` without what its zeros, or `masks`, allow to remove; a report). Rank 0 only.

    The arguments are those of `plan`. The copy is compared with the masked model on the example, on fresh inputs and at
    another batch size, in float64 where the model can run in it. A difference above `tolerance` raises UserError naming
    the first op that differs; with norm="plain", which changes the function, it is only reported. `model` stays as it
    was, whatever happens, and shares no tensor with the copy.
    """
    if not tolerance > 0:
        raise UserError(f"tolerance={tolerance!r} must be above 0, such as 1e-5.")
    seconds: dict[str, float] = {}
    given = captured(model, args, kwargs, {"norm": norm, "keep": tuple(keep), "barrier": tuple(barrier)})
    with timed(seconds, "plan"):
        made = plan(given, masks=masks, round_to=round_to)
    with timed(seconds, "apply"):
        reference = masked(given.model, check_masks(given.model, masks or {}))
        small = apply(duplicate(reference), made)
    with timed(seconds, "verify"):
        allowed = math.inf if given.settings.norm == "plain" else tolerance
        found = compare(reference, small, made, (given.args, given.kwargs), allowed)
    with timed(seconds, "measure"):
        parameters = (num_params(given.model), num_params(small))
        before, after = _macs(given.model, given), _macs(small, given)
    counted = None if before is None or after is None else (before, after)
    return small, Report(parameters, counted, found, made, seconds)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[phase]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def change(counts: tuple[int, int]) -> str:
    """(100, 50) -> "100 -> 50 (50.0%)"."""
    before, after = counts
    return f"{before:,} -> {after:,}" + (f" ({after / before:.1%})" if before else "")


def _macs(model: nn.Module, given: Capture) -> int | None:
    try:
        return macs(model, copy.deepcopy(given.args), copy.deepcopy(given.kwargs))
    except Exception:  # an op that the counter cannot count, or a model without values
        return None
