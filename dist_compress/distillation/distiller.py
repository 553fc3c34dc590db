"""The distiller: asks the teacher about every micro-batch and adds what the terms make of it to the loss.

    loss = task_weight * task loss + weight * sum of the terms

Each term is a sum over samples or valid tokens, which the loop divides by the count of the global batch, so ranks with
unequal shares agree with one rank. Nothing here is collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_compress.config import Config
from dist_compress.distillation.ramp import Ramp
from dist_compress.distillation.stored import StoreTeacher
from dist_compress.distillation.teacher import OnlineTeacher, Teacher
from dist_compress.distillation.term import Moment, build_term
from dist_compress.errors import UserError
from dist_compress.method import Context, Method

ROOT = "distillation"


def build(config: Config, split: Any, teacher_model: Callable[[], nn.Module]) -> list[Method]:
    """The distiller of the run, if any. Collective. `split`: the training data. `teacher_model()`: the network of
    `distillation.teacher.model` with its weights, on the device of the run; called for an online teacher. Raises
    UserError."""
    if config.distillation.method is None:
        return []
    if config.distillation.teacher.mode == "store":
        return [Distiller(config, StoreTeacher(config, split))]
    return [Distiller(config, OnlineTeacher(teacher_model(), config.distillation.teacher.precision))]


class Distiller(Method):
    compresses = False

    def __init__(self, config: Config, teacher: Teacher) -> None:
        self.config, self.teacher, self.step = config.distillation, teacher, 0
        assert self.config.method is not None
        self.terms = [build_term(self.config.method, self.config.options, ROOT)]

    def attach(self, context: Context) -> None:
        """Local, the same on every rank. Raises UserError when student and teacher do not go together."""
        self.weight = self._ramp("weight", context)
        self.temperature = self._ramp("temperature", context)
        if self.config.weight_ramp.to is None and self.config.weight == 0:
            raise UserError("distillation.weight=0: the teacher changes nothing. distillation=none trains without.")
        steps = range(max(context.total_steps, 1)) if self.temperature.changes else (0,)
        temperatures = sorted({self.temperature(step) for step in steps})
        for term in self.terms:
            term.attach(context, self.teacher, temperatures)

    def _ramp(self, name: str, context: Context) -> Ramp:
        first, config = getattr(self.config, name), getattr(self.config, f"{name}_ramp")
        return Ramp(first, config, f"{ROOT}.{name}_ramp", context.total_steps, context.steps_per_epoch)

    def task_weight(self, step: int) -> float:
        return self.config.task_weight

    def loss(self, step: int, batch: dict[str, Any], output: Any) -> dict[str, torch.Tensor]:
        self.step = step
        moment, weight = Moment(step, self.temperature(step)), self.weight(step)
        answer = self.teacher(batch)
        return {f"{term.name}_loss": weight * term.loss(moment, batch, output, answer) for term in self.terms}

    def notes(self) -> list[str]:
        return [self.teacher.note()]

    def metrics(self) -> dict[str, float]:
        return {f"{ROOT}/weight": self.weight(self.step), f"{ROOT}/temperature": self.temperature(self.step)}
