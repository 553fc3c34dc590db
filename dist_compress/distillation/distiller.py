"""The distiller: asks the teacher about every micro-batch and adds what the terms make of it to the loss.

    loss = task_weight * task loss + weight * sum of the terms

Each term is a sum over samples or valid tokens, which the loop divides by the count of the global batch, so ranks with
unequal shares agree with one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.calling import Headless
from dist_compress.config import Config
from dist_compress.config_list import overrides
from dist_compress.distillation import vocabulary
from dist_compress.distillation.layerwise import LOST, LayerTerm, matching
from dist_compress.distillation.ramp import Ramp
from dist_compress.distillation.stored import StoreTeacher
from dist_compress.distillation.targets import DISTILLATION, resolve, wanted
from dist_compress.distillation.teacher import OnlineTeacher, Teacher
from dist_compress.distillation.term import Moment, Term, options_of, term_class
from dist_compress.distillation.translators import Translators
from dist_compress.duration import duration
from dist_compress.errors import UserError
from dist_compress.method import Context, Method, Tensors
from dist_compress.parts import Parts
from dist_compress.sites import Sites
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.weightless import is_weightless

ROOT = "distillation"


def build(config: Config, split: Any, teacher_model: Callable[[], nn.Module]) -> list[Method]:
    """The distiller of the run, if any. Collective. `split`: the training data. `teacher_model()`: the network of
    `distillation.teacher.model` with its weights, on the device of the run; called for an online teacher. Raises
    UserError."""
    if not wanted(config.distillation):
        return []
    if config.distillation.teacher.mode == "vocab":
        name = config.distillation.method
        vocabulary.check(config, getattr(term_class(name, ROOT) if name else Term, "fuses", False))
    if config.distillation.teacher.mode == "store":
        if config.distillation.teacher.sharded:
            raise UserError(
                "distillation.teacher.sharded=true with mode=store: there is no network to share out, each rank reads "
                "the answers of its own samples. Set it to false, or mode=online."
            )
        return [Distiller(config, StoreTeacher(config, split))]
    precision = config.distillation.teacher.precision
    return [Distiller(config, OnlineTeacher(teacher_model(), precision, config.train.compile))]


class Distiller(Method):
    compresses = False

    def __init__(self, config: Config, teacher: Teacher) -> None:
        self.config, self.teacher, self.step = config.distillation, teacher, 0
        self.teaches = self.config.teacher.mode != "self"  # else when it has got its weights
        self.lr = config.distillation.translator_lr

    def attach(self, context: Context) -> None:
        """Local, the same on every rank. Raises UserError when student and teacher do not go together."""
        self.context = context
        self.weight = self._ramp("weight", context)
        self.temperature = self._ramp("temperature", context)
        if self.config.weight_ramp.to is None and self.config.weight == 0:
            raise UserError("distillation.weight=0: the teacher changes nothing. distillation=none trains without.")
        steps = range(max(context.total_steps, 1)) if self.temperature.changes else (0,)
        temperatures = sorted({self.temperature(step) for step in steps})
        self.translators = Translators(context.config.seed, context.num_micro, self.lr, comm.device())
        self.terms: list[Term] = []
        self.layers = self._layers(context)
        if self.config.method is not None and not issubclass(kind := term_class(self.config.method, ROOT), LayerTerm):
            name = self.config.method.rpartition(".")[2]
            self.terms.append(kind(name, options_of(kind, self.config.options, ROOT)))
            self.terms[0].attach(context, self.teacher, temperatures)
        elif not self.layers:
            raise UserError(
                f"{ROOT}.method={self.config.method!r} compares hidden states: name them in {DISTILLATION.root}, "
                "such as {op_names: [layer3]}."
            )
        self.terms += self.layers
        self.translators.ready()

    def _layers(self, context: Context) -> list[LayerTerm]:
        assert context.example is not None
        sites = Sites(context.model, *context.example)
        layers = []
        self.settings = resolve(self.config, context.model, sites) if self.config.config_list else []
        for setting in self.settings:
            where = setting.sources.get("method", ROOT)
            kind = term_class(setting.method, where) if setting.method is not None else Term
            if not issubclass(kind, LayerTerm):
                raise UserError(
                    f"{setting.sources['']}: {setting.name} has the method {setting.method!r}, which compares no "
                    "hidden states. Set method: fitnets there, for example."
                )
            term = kind(setting, options_of(kind, setting.options, where))
            term.join(context, self.teacher, sites, self.translators)
            layers.append(term)
        return layers

    def _ramp(self, name: str, context: Context) -> Ramp:
        first, config = getattr(self.config, name), getattr(self.config, f"{name}_ramp")
        return Ramp(first, config, f"{ROOT}.{name}_ramp", context.total_steps, context.steps_per_epoch)

    def start_step(self, shrink: int | None) -> int | None:
        if self.teaches:
            return None
        start, end = self.config.teacher.start, self.context.total_steps
        step = duration(start, f"{ROOT}.teacher.start", end, self.context.steps_per_epoch)
        if step >= min(end, end if shrink is None else shrink):
            last = f"the run has {end} steps" if shrink is None else f"the model is shrunk at step {shrink}"
            raise UserError(
                f"{ROOT}.teacher.start={start!r} is step {step}, but {last}: the student cannot become its teacher "
                "then. Lower it, best to the start of the compression."
            )
        return step

    def start(self) -> list[str]:
        """Let the teacher be the student as it is, beneath masks and quantizers. Collective if the student is sharded,
        one parameter after the other."""
        assert isinstance(self.teacher, OnlineTeacher)
        layout, here = self.context.projection.layout, self.context.model.state_dict()
        with self.context.projection.lifted():
            own = {name: layout.local(name) for name, _ in self.context.model.named_parameters()}
            parts = Parts.of(layout, own)
            self.teacher.take(lambda name: parts.whole(name) if name in own else here[name])
        self.teaches = True
        return ["the student as it is now is the teacher from here on"]

    def task_weight(self, step: int) -> float:
        return self.config.task_weight if self.teaches else 1.0

    def loss(self, step: int, batch: dict[str, Any], output: Any) -> dict[str, torch.Tensor]:
        self.step = step
        if not self.teaches:
            return {f"{term.name}_loss": torch.zeros((), device=comm.device()) for term in self.terms}
        moment, weight = Moment(step, self.temperature(step)), self.weight(step)
        answer = self.teacher(batch, isinstance(getattr(output, "logits", None), Headless))
        return {f"{term.name}_loss": weight * term.loss(moment, batch, output, answer) for term in self.terms}

    def after_backward(self, step: int, micro: int) -> None:
        self.translators.after_backward(micro)

    def before_step(self, step: int) -> None:
        """Collective when there are translators, the same ones on every rank."""
        self.translators.step()

    def detach(self) -> None:
        """The student is about to be shrunk: remember its hidden states on the example, unless it has no values, which
        come with those of `load_state_dict`. Distillation goes on. Collective if the student is sharded."""
        self.states = [] if is_weightless(self.context.model) else self._states()

    def rebase(self, transform: Callable[[Tensors], Tensors]) -> None:
        for layer in self.layers:
            layer.rehook()

    def reattach(self) -> list[str]:
        """Find by the hidden states which channels of each target are left. Collective."""
        if not self.states:
            return []
        old, new = self.states, self._states()
        found = comm.on_rank0(lambda: [matching(*states) for states in zip(old, new, strict=True)])
        self.states = []
        for layer, kept in zip(self.layers, found, strict=True):
            layer.kept = LOST if kept is None else kept.to(comm.device())
        return []

    def _states(self) -> list[torch.Tensor]:
        """Of each layer's target, on the example, on the CPU. Collective if the student is sharded."""
        if not self.layers:
            return []
        assert self.context.example is not None
        args, kwargs = self.context.example
        taps = [layer.watch() for layer in self.layers]
        try:
            with untouched(self.context.model):
                self.context.model(*args, **kwargs)
        finally:
            for _, handle in taps:
                handle.remove()
            self.context.rest()
        return [tap.take(layer.setting.path).cpu() for layer, (tap, _) in zip(self.layers, taps, strict=True)]

    def notes(self) -> list[str]:
        return [self.teacher.note(), *overrides(self.settings)]

    def metrics(self) -> dict[str, float]:
        return {f"{ROOT}/weight": self.weight(self.step), f"{ROOT}/temperature": self.temperature(self.step)}

    def state_dict(self) -> dict[str, Any]:
        none = torch.zeros(0, dtype=torch.int64)
        kept = {layer.name: none if layer.kept is None else layer.kept for layer in self.layers}
        own = self.teaches and self.config.teacher.mode == "self"
        weights = self.teacher.state() if own and isinstance(self.teacher, OnlineTeacher) else {}
        return {"translators": self.translators.state_dict(), "kept": kept, "teacher": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.translators.load_state_dict(state["translators"])
        if state["teacher"] and isinstance(self.teacher, OnlineTeacher):
            self.teacher.take(lambda name: state["teacher"][name].to(comm.device()))
            self.teaches = True
        for layer in self.layers:
            kept = state["kept"][layer.name].to(comm.device())
            layer.kept = None if not len(kept) else LOST if kept.equal(LOST.to(kept)) else kept
