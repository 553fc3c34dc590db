"""Points in time as recipes write them: a fraction of the run, "120steps" or "3epochs"."""

from __future__ import annotations

import re

from dist_compress.errors import UserError

_TIMED = re.compile(r"(\d+(?:\.\d+)?)\s*(step|epoch)s?")


def duration(value: float | str, key: str, total_steps: int, steps_per_epoch: float) -> int:
    """`value` in optimizer steps. Raises UserError naming `key`.

    A number in [0, 1] is a fraction of `total_steps`, rounded to a whole step, so that a recipe keeps its
    shape at any length. "120steps" and "3epochs" (also "0.5epochs") are taken as they are.
    """
    if isinstance(value, str):
        if (match := _TIMED.fullmatch(value.strip())) and (match[2] == "epoch" or match[1].isdigit()):
            number = float(match[1])
            return round(number * steps_per_epoch) if match[2] == "epoch" else int(number)
    elif not isinstance(value, bool) and 0 <= value <= 1:
        return round(value * total_steps)
    hint = f" For that many steps write '{value}steps'." if isinstance(value, int) and value > 1 else ""
    raise UserError(
        f"{key}={value!r} is no duration. Give a fraction of the run in [0, 1], or '120steps', or '3epochs'.{hint}"
    )
