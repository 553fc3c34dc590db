"""What is asked of one model: captured, replayed, and plans of 30 % and 50 % verified on new inputs."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_structure

from dist_compress import concrete_trace
from dist_compress.errors import UserError
from dist_compress.speedup import Capture, apply, capture, coupling, mask_units, plan, verify
from dist_compress.target import Coupling
from zoo_models.case import Case

SHARES = (0.3, 0.5)  # of the units of every group that is not blocked
ENOUGH = 0.2  # of the parameters have to go for a model to count
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest output
_HOLLOW = 1e-7  # masks that change the output by less than this prove nothing
BATCH, OTHER_BATCH = 2, 3

Row = dict[str, Any]


class Failure(Exception):
    """(class, detail) of what a model did not do."""


def check(case: Case, report: Callable[[Row], None]) -> None:
    """Fills a row and hands it to `report` after each phase, so that a process that dies leaves what it found."""
    row: Row = {"seconds": {}}
    phase = _Phases(row, report)
    try:
        with phase("build"):
            torch.manual_seed(0)
            model = case.build().eval()
            randomise(model)
            model, inputs, dtype = _widest(model, case)
            row["params"] = _num_params(model)
            row["precision"] = str(dtype).removeprefix("torch.")
        _replay(model, inputs, TOLERANCE[dtype], row, phase)
        for norm in ("keep", "exact"):
            found = _shrink(model, inputs, norm, TOLERANCE[dtype], phase)
            if norm == "keep" or "error" in found or _removed(found) > _removed(row):
                row |= found
            if "error" in found or _removed(row) >= ENOUGH:
                break
        _judge(row)
    except MemoryError:
        row |= {"failure": "memory", "detail": phase.name}
    except Failure as failure:
        row |= {"failure": failure.args[0], "detail": failure.args[1]}
    report(row)


def randomise(model: nn.Module) -> None:
    """No weight is zero, and no constant hides a branch: what would be dead by its initial values is not."""
    with torch.no_grad():
        for tensor in model.parameters():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if bool((tensor == tensor.flatten()[0]).all()):
                tensor.uniform_(0.5, 1.5) if bool(tensor.flatten()[0]) else tensor.normal_(0, 0.1)
            tensor.copy_(torch.where(tensor == 0, torch.randn_like(tensor) * 0.1, tensor))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)


def _widest(model: nn.Module, case: Case) -> tuple[nn.Module, Any, torch.dtype]:
    """The model in float64 where its own code runs in it, else as it was, with inputs of its precision."""

    def double(batch: int) -> Any:
        return tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, case.inputs(batch))

    try:
        torch.manual_seed(0)
        wide = copy.deepcopy(model).double()
        _run(wide, double(BATCH))
        return wide, double, torch.float64
    except RuntimeError:
        _run(model, case.inputs(BATCH))
        return model, case.inputs, torch.float32


def _replay(model: nn.Module, inputs: Any, tolerance: float, row: Row, phase: _Phases) -> None:
    with phase("capture"):
        args, kwargs = inputs(BATCH)
        try:
            graph = concrete_trace(model, args, kwargs)
        except UserError as error:
            raise Failure("capture failed", str(error)) from error
        row["captured"] = True
        row["specialised"] = len(graph.meta["specialised"])
    with phase("replay"):
        for key, batch in (("replay_new", BATCH), ("replay_batch", OTHER_BATCH)):
            given = inputs(batch)
            if tree_structure(given) != tree_structure((args, kwargs)):
                continue  # a list of more images: a graph has one placeholder for each
            expected = _run(model, given)
            try:
                row[key] = verify(expected, _run(graph, given)) <= tolerance
            except Exception as error:
                row[key], row["replay_error"] = False, _text(error)


def _shrink(model: nn.Module, inputs: Any, norm: str, tolerance: float, phase: _Phases) -> Row:
    """The rows of the plans under one setting of norms; the first thing that goes wrong is in "error"."""
    found: Row = {"plans": {}, "norm": norm}
    try:
        with phase("coupling"):
            captured = capture(model, *inputs(BATCH), norm=norm)
            units = coupling(captured)
    except Exception as error:
        return found | {"error": ["plan fails", _text(error)], "free": 0}
    found |= {"groups": len(units.groups), "blocked": _blocked(units)}
    found["free"] = sum(not group.blocked and group.num_units > 1 for group in units.groups)
    if not found["free"]:
        try:
            return found | {"blocked": _rows_that_stay(model, captured, norm, phase)}
        except Exception as error:
            return found | {"error": ["plan fails", _text(error)]}
    for share in SHARES:
        try:
            found["plans"][f"{share:.0%}"] = _plan(model, captured, units, share, inputs, norm, tolerance, phase)
        except Failure as failure:
            found.setdefault("error", list(failure.args))
        except Exception as error:
            found.setdefault("error", ["plan fails", _text(error)])
    return found


def _plan(
    model: nn.Module,
    captured: Capture,
    units: Coupling,
    share: float,
    inputs: Any,
    norm: str,
    tolerance: float,
    phase: _Phases,
) -> Row:
    masked = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for group in units.groups:
        if not group.blocked and group.num_units > 1:
            count = min(max(1, round(share * group.num_units)), group.num_units - 1)
            mask_units(masked, group, torch.randperm(group.num_units, generator=generator)[:count])
    with phase("plan"):
        made = plan(masked, captured.args, captured.kwargs, norm=norm)
    with phase("apply"):
        small = apply(copy.deepcopy(masked), made)
    result: Row = {"removed": round(1 - _num_params(small) / _num_params(model), 4)}
    if any(swap.settings.get("single") for swap in made.swaps.values()):  # norms that compute in float32 by themselves
        result["precision"], tolerance = "float32", TOLERANCE[torch.float32]
    with phase("verify"):
        for key, batch in (("new", BATCH), ("batch", OTHER_BATCH)):
            given = inputs(batch)
            expected = _run(masked, given)
            if key == "new":
                result["effect"] = verify(_run(model, given), expected)
            try:
                result[key] = verify(expected, _run(small, given))
            except Exception as error:
                raise Failure("not exact", f"the small model fails: {_text(error)}") from error
            if not result[key] <= tolerance:
                raise Failure("not exact", f"{share:.0%}, {key}: {result[key]:.1e}")
    return result


def _judge(row: Row) -> None:
    """Raises Failure unless everything holds."""
    if "error" in row:
        raise Failure(*row["error"])
    if not row["free"]:
        raise Failure("nothing can go", "; ".join(f"{why} ({count})" for why, count in row["blocked"][:3]))
    for share, result in row["plans"].items():
        if not result["effect"] > _HOLLOW:
            raise Failure("shows nothing", f"{share}: the output does not see the masks")
    if _removed(row) < ENOUGH:
        raise Failure("removes too little", f"{_removed(row):.0%} of the parameters")


def _rows_that_stay(model: nn.Module, captured: Capture, norm: str, phase: _Phases) -> list[tuple[str, int]]:
    """Why, when a part of the rows of every weight is masked, whether a group has them or not."""
    masked = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in masked.parameters():
            if parameter.dim() > 1 and parameter.size(0) > 1:
                count = max(1, round(SHARES[0] * parameter.size(0)))
                parameter[torch.randperm(parameter.size(0), generator=generator)[:count]] = 0
    with phase("plan"):
        made = plan(masked, captured.args, captured.kwargs, norm=norm)
    reasons: Counter[str] = Counter()
    for slices in made.blocked:
        reasons[_without_module(slices.reason)] += slices.count
    return reasons.most_common(4)


def _removed(row: Row) -> float:
    return max((result["removed"] for result in row.get("plans", {}).values()), default=0.0)


def _blocked(units: Coupling) -> list[tuple[str, int]]:
    """Why units stay, with their number; the most first."""
    reasons: Counter[str] = Counter()
    for group in units.groups:
        if group.blocked:
            reasons[_without_module(group.blocked)] += group.num_units
    return reasons.most_common(4)


def _without_module(reason: str) -> str:
    """ "mm in layers.0.mlp keeps it" without the place, so that layers add up."""
    return re.sub(r" in (the model itself|\S+) ", " ", reason, count=1)


def _run(model: nn.Module, given: Any) -> Any:
    args, kwargs = copy.deepcopy(given)
    torch.manual_seed(0)
    with torch.no_grad():
        return model(*args, **kwargs)


def _num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _text(error: BaseException) -> str:
    text = re.sub(r"/\S*/site-packages/", "", f"{type(error).__name__}: {error}")  # where this machine has it
    return text.replace("\n", " ")[:300]


class _Phases:
    """Context managers that add the CPU seconds of a phase to the row and report it."""

    def __init__(self, row: Row, report: Callable[[Row], None]) -> None:
        self.row, self.report, self.name, self.start = row, report, "", 0.0

    def __call__(self, name: str) -> _Phases:
        self.name = name
        self.report(self.row | {"failure": "time", "detail": name})
        return self

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *exception: object) -> None:
        seconds = self.row["seconds"]
        seconds[self.name] = round(seconds.get(self.name, 0.0) + time.process_time() - self.start, 3)
