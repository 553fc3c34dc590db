"""When a pruner decides, and how much of the ratio it then spends.

A decision "at t" is taken after t optimizer steps. `linear` spends an equal share at each decision; `agp`
follows Zhu & Gupta 2017 (arXiv:1710.01878), s = s_final (1 - (1 - p)^3); `exponential` removes the same share of what
is left each time, as iterative magnitude pruning does (Frankle & Carbin 2019, arXiv:1803.03635): 1 - s = (1 -
s_final)^p; a dotted path names the user's own f(p). The last decision always spends everything, also when the run is
so short that decisions fall on the same step.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from dist_compress.config import ScheduleConfig
from dist_compress.duration import duration
from dist_compress.errors import UserError
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.setting import Setting

_CURVES: dict[str, Callable[[float, float], float]] = {  # of the progress p in (0, 1] and the final ratio s below 1
    "one_shot": lambda p, s: 1.0,
    "linear": lambda p, s: p,
    "agp": lambda p, s: 1.0 - (1.0 - p) ** 3,
    "exponential": lambda p, s: (1.0 - (1.0 - s) ** p) / s if s else p,
}
_KEY = "pruning.schedule"


def decisions(
    schedule: ScheduleConfig, total_steps: int, steps_per_epoch: float, data_driven: str = "", ratio: float = 0.0
) -> dict[int, float]:
    """{t: fraction of the ratio in [0, 1]}, t ascending, the last fraction exactly 1.

    `num_decisions` are evenly spaced from start to end, the only one of a single decision lies at the
    later of both. `data_driven` names a method that needs gradients: its first decision needs a step
    before it. `ratio`: the largest that is asked for, below 1, which `exponential` depends on.
    """
    start, end = (
        duration(value, f"{_KEY}.{key}", total_steps, steps_per_epoch)
        for key, value in (("start", schedule.start), ("end", schedule.end))
    )
    number = schedule.num_decisions
    if number < 1:
        raise UserError(f"{_KEY}.num_decisions={number}: at least 1 decision is needed.")
    if schedule.name == "one_shot" and number != 1:
        raise UserError(f"{_KEY}.num_decisions={number}: one_shot decides once. Set it to 1, or choose another name.")
    if number > 1 and end < start:
        raise UserError(f"{_KEY}.end={schedule.end} (step {end}) lies before start={schedule.start} (step {start}).")
    if max(start, end) > total_steps:
        raise UserError(
            f"{_KEY}: the last decision lies at step {max(start, end)}, but the run has {total_steps}. "
            "Lower start and end, or give them as fractions of the run."
        )
    curve = _curve(schedule.name, ratio)
    times = (
        [max(start, end)]
        if number == 1
        else [start + round(Fraction((end - start) * i, number - 1)) for i in range(number)]
    )
    plan = {t: _fraction(curve, schedule.name, (i + 1) / number) for i, t in enumerate(times)}
    plan[times[-1]] = 1.0
    if sorted(plan.values()) != list(plan.values()):
        raise UserError(f"{_KEY}.name={schedule.name!r}: fractions must not fall, got {list(plan.values())}.")
    return _leave_a_step(plan, schedule, total_steps, data_driven)


def due(
    schedule: Mapping[int, float],
    settings: Sequence[Setting],
    scorers: Mapping[str, Metric],
    total_steps: int,
    steps_per_epoch: float,
) -> dict[int, dict[str, Metric]]:
    """{t: {target: its metric}} of all that is decided at t, t ascending: everything at the decisions of the schedule,
    between and after them what decides more often."""
    plan = {t: dict(scorers) for t in schedule}
    asked: dict[int, list[int]] = {}  # by metric, which targets share
    for setting in settings:
        if setting.align is not None:
            continue
        metric, root = scorers[setting.name], setting.sources.get("options", "pruning")

        def steps(value: float | str, option: str, root: str = root) -> int:
            return duration(value, f"{root}.options.{option}", total_steps, steps_per_epoch)

        if id(metric) not in asked:
            asked[id(metric)] = [t for t in metric.updates(min(schedule), steps) if t <= total_steps]
        for t in asked[id(metric)]:
            plan.setdefault(t, {})[setting.name] = metric
    return dict(sorted(plan.items()))


def _leave_a_step(plan: dict[int, float], schedule: ScheduleConfig, total_steps: int, method: str) -> dict[int, float]:
    """A start that rounds to step 0 in a short run means step 1 for a method that needs gradients; 0
    itself is refused."""
    if not method or 0 not in plan:
        return plan
    given = [schedule.start] if schedule.num_decisions > 1 else [schedule.start, schedule.end]
    if total_steps == 0 or not any(re.search("[1-9]", str(value)) for value in given):
        raise UserError(
            f"{_KEY}.start={schedule.start}: the first decision would come before the first optimizer step, but "
            f"{method} scores by data. Leave it at least one step, e.g. {_KEY}.start=1steps (and end no earlier)."
        )
    fraction = plan.pop(0)
    return dict(sorted({1: fraction, **plan}.items()))


def _curve(name: str, ratio: float) -> Callable[[float], float]:
    if name in _CURVES:
        return lambda progress: _CURVES[name](progress, ratio)
    module, _, function = name.rpartition(".")
    try:
        curve = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"{_KEY}.name={name!r}: {error}. Allowed: {', '.join(_CURVES)}, or pkg.module.f.") from None
    if curve is None or not callable(curve):
        raise UserError(f"{_KEY}.name={name!r}: no such schedule. Allowed: {', '.join(_CURVES)}, or pkg.module.f.")
    return curve  # type: ignore[return-value]


def _fraction(curve: Callable[[float], float], name: str, progress: float) -> float:
    value = float(curve(progress))
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{_KEY}.name={name!r}: f({progress:g}) = {value:g} is not a fraction in [0, 1].")
    return value
