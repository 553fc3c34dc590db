"""A value that changes over the run: linear, or half a cosine, between two points in time."""

from __future__ import annotations

import math

from dist_compress.config import RampConfig
from dist_compress.duration import duration
from dist_compress.errors import UserError


class Ramp:
    """`ramp(step)`: `first` up to `start`, `config.to` from `end` on. Local, the same on every rank."""

    def __init__(self, first: float, config: RampConfig, key: str, total_steps: int, steps_per_epoch: float) -> None:
        """`key`: where `config` stands. Raises UserError."""
        self.first, self.last, self.name = first, first if config.to is None else config.to, config.name
        self.start, self.end = (
            duration(value, f"{key}.{name}", total_steps, steps_per_epoch)
            for name, value in (("start", config.start), ("end", config.end))
        )
        if self.changes and self.end < self.start:
            raise UserError(
                f"{key}.end={config.end} (step {self.end}) lies before start={config.start} (step {self.start})."
            )

    @property
    def changes(self) -> bool:
        return self.last != self.first

    def __call__(self, step: int) -> float:
        if step >= self.end or step < self.start:
            return self.last if step >= self.end else self.first
        done = (step - self.start) / (self.end - self.start)
        if self.name == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return self.first + (self.last - self.first) * done
