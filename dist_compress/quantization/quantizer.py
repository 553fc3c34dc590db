"""The quantizer: puts fake quantizers on the targets, keeps their scales, and leaves a model that can be deployed.

    attach       modules for activations are hooked into the data flow; nothing is quantized yet
    start        methods that change weights hear what layers are called with, and change them (preparing.py); forward
                 passes are observed, float (`Context.calibrate`); then ranges are known, and `begin`
    begin        everything is quantized from here on
    train        methods that train: each step is observed, and its ranges are those of the next
    detach       the model is float again while its shrink is planned, made and verified
    rebase       scales, what they follow and what is learned are sliced as the tensors were (shrinking.py), and hooked
                 into the model again
    reattach     everything is quantized again, and compared with what it was (agreement.py)
    finish       norms are folded, weights are what integer kernels will hold

Weights are compressed by projection, so between optimizer step and forward; their latents are trained. Masks come
first: a masked weight is zero, which every range holds. All observers share one MAX and one SUM collective a step.
Scales are the same on every rank, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dist_compress import call_sites, comm
from dist_compress.config import Config
from dist_compress.config_list import overrides
from dist_compress.duration import duration
from dist_compress.fingerprint import weights_fingerprint
from dist_compress.method import Context, Listener, Method, Tensors
from dist_compress.quantization import agreement, checks, preparing
from dist_compress.quantization.activations import Activations
from dist_compress.quantization.config_list import resolve, spec_of
from dist_compress.quantization.deploy import install, name_of, round_biases
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.granularity import mixed
from dist_compress.quantization.mixed import Mixed
from dist_compress.quantization.shrinking import Shrink, Transform, follow
from dist_compress.quantization.table import Row, table
from dist_compress.quantization.targets import collect
from dist_compress.quantization.weights import Weights
from dist_compress.sites import Sites


def build(config: Config) -> list[Method]:
    """The quantizer of the run, if any: all entries of the config list, whatever their methods."""
    wanted = config.quantization.method is not None or any(
        isinstance(entry, dict) and entry.get("method") is not None for entry in config.quantization.config_list
    )
    return [Quantizer(config)] if wanted else []


class Quantizer(Method):
    """Targets by `quantization.config_list`."""

    compresses = False
    adjective = "quantized"

    def __init__(self, config: Config) -> None:
        self.config = config.quantization
        self.begun = False
        self.rows: list[Row] = []
        self.said: list[str] = []  # by methods that changed weights
        self.difference: float | None = None  # of the quantized model, masked and shrunk

    def foresee(self, model: nn.Module, example: Any) -> dict[tuple[str, str], Spec]:
        sites = Sites(model, *example)
        settings = resolve(self.config, model, sites)
        found = {(setting.module, setting.target): spec_of(setting, model, sites)[0] for setting in settings}
        call_sites.hide(model, ())
        return found

    def attach(self, context: Context) -> None:
        """Find the targets, fuse layers with their norms, hook the quantizers in. Collective. Raises UserError."""
        self.context = context
        found = collect(self.config, Sites(context.model, *self._example()), "onnx" in context.config.export)
        self.settings, self.reduced, self.fused = found.settings, found.reduced, found.fused
        self.activations, self.parameters = found.activations, found.parameters
        if context.config.speedup.enabled:
            checks.blocks(self.parameters, context.coupling, context.config.speedup.round_to)
        self.observed, self.weights = Activations(found.activations), Weights(context, found.parameters, found.fused)
        self.mixed = Mixed(self.config.mixed, self.settings, self.parameters, context, self.reduced)
        self._install()
        self.freeze = duration(self.config.freeze, "quantization.freeze", context.total_steps, context.steps_per_epoch)
        self.step = 0

    def _install(self) -> None:
        """Put the quantizers into the model as it is now. Collective."""
        model = self.context.model
        self.weights.install()
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        handles = [install(model, *quantizer.place, quantizer) for quantizer in self._all().values()]
        self.handles = [handle for handle in handles if handle is not None]
        self.graph = preparing.graph(Sites(model, *self._example()), self._all().values())
        self.hook = model.register_forward_pre_hook(self._begin_pass)

    def start_step(self, shrink: int | None) -> int | None:
        if self.begun:
            return None
        start, total_steps = self.config.start, self.context.total_steps
        trains = any(quantizer.trains for quantizer in self._all().values())
        if start is None:
            return (shrink or 0) if trains else total_steps
        step = duration(start, "quantization.start", total_steps, self.context.steps_per_epoch)
        checks.start(start, step, total_steps, trains)
        if step < (shrink or 0):
            checks.binary_later(self.parameters, f"quantization.start={start!r} is step {step}", shrink)
        return step

    def rounds(self) -> Iterator[tuple[Listener, int]]:
        """What has to be shown the calibration data before `begin`, one after the other, and how many global batches
        of it. Whatever changes weights has done so before the next is given out. Every step is collective."""
        self.weights.look_at_norms()
        known = self.graph, self.weights.folds, self.said
        for listener in preparing.rounds(self.context, self._all().values(), *known):
            yield listener, self.config.calibration_steps
        if self.observed.observers():
            yield self.observed, self.config.calibration_steps

    def _begin_pass(self, model: nn.Module, args: Any) -> None:
        trained = self.begun and model.training
        self.observed.begin_pass(trained and self.step < self.freeze)
        if trained and self.step >= self.freeze:
            for norm in self.norms:
                norm.training = False

    def start(self) -> list[str]:
        """Calibrate and begin. Collective. Raises UserError."""
        known = self.notes()
        for listener, num_steps in self.rounds():
            assert self.context.calibrate is not None
            self.context.calibrate(listener, num_steps)
        self.begin()
        return [line for line in self.notes() if line not in known]

    @torch.no_grad()
    def begin(self) -> None:
        """The calibration is over: quantize from here on. Collective. Raises UserError where nothing, or nothing
        finite, was seen, and for pruned weights of a dtype without a zero."""
        projection = self.context.projection
        checks.binary_whole(self.parameters, projection)
        projection.project()  # with the masks: what they remove has no part in a range
        self.observed.begin()
        self.weights.look_at_norms()
        with projection.lifted():
            self.said += self.mixed.choose(self.weights)
        self.weights.fit()
        with projection.lifted():
            self._put_on()
        comm.check_equal("quantization scales", self.fingerprint(), self.step)

    def _put_on(self) -> None:
        for quantizer in self._all().values():
            quantizer.enabled = True
        self.weights.put_on()
        self.begun = True

    def after_backward(self, step: int, micro: int) -> None:
        if self.begun:
            self.observed.count_pass()

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if self.begun:
            self.observed.before_step()
            self.weights.gradients()

    def after_step(self, step: int) -> None:
        """Ranges of the step become those of the next. Collective."""
        self.step = step + 1
        if self.begun:
            self.observed.stepped(step < self.freeze)
            self.weights.stepped()

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Fill the table of tensors from one call of the model, before `fold`. Local, the same on every rank."""
        self.rows = table(self.context.model, self.activations, self.parameters, self.weights.folded, args, kwargs)

    def detach(self) -> None:
        model, projection = self.context.model, self.context.projection
        self.hook.remove()
        if self.begun:
            projection.project()
            rest = self.context.rest if self.weights.places.sharded else None
            self.agreement = agreement.ask(model, self._example(), self.observed.floating, rest)
        with projection.lifted():
            self.weights.take_off()
        projection.project()
        for handle in self.handles:
            handle.remove()
        for quantizer in self._all().values():
            where, target = quantizer.place
            delattr(model.get_submodule(where), name_of(target))
            quantizer.enabled = False
        self.shrink = Shrink(self.context, self.activations)

    def substitutes(self) -> bool:
        return self.begun

    def added(self) -> list[str]:
        return self.shrink.added()

    def rebase(self, transform: Transform) -> None:
        self.members = self.shrink.cut(self.settings, self.parameters, transform)
        self._install()

    def follow(self, tensors: Tensors) -> Tensors:
        return follow({path: self._all()[path] for path in self.members}, self.members, tensors)

    @torch.no_grad()
    def reattach(self) -> list[str]:
        if not self.begun:
            return []
        projection, weights = self.context.projection, self.parameters.values()
        self.weights.refit(self.members)
        with projection.lifted():
            self._put_on()
        speedup, anew = self.context.config.speedup, any(bool(mixed(m).any()) for m in self.members.values())
        changed = anew or speedup.norm == "plain" or not all(q.elementwise for q in weights)
        projection.project()  # with the scales of the masked model, sliced: with these both must agree
        self.difference = self.agreement.check(None if changed else speedup.tolerance)
        with projection.lifted():
            self.weights.follow()  # from here on ranges are those of the weights that are left
        comm.check_equal("quantization scales", self.fingerprint(), self.step)
        return self.agreement.notes(self.difference)

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.context.example is not None
        return self.context.example

    def conclude(self) -> None:
        self.weights.forget()

    def finish(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Fold norms for good: the model that is left must be the one that was simulated. Then round the biases."""
        model, call = self.context.model, (args, kwargs)
        self.measure(args, kwargs)
        with self.observed.floating():
            simulated = agreement.answer(model, call)
            self.fold()
            difference = agreement.folded_difference(simulated, agreement.answer(model, call))
        round_biases(model)
        return {**self.results(), "verify/folded_max_rel_diff": difference}

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the norms and leave the quantized weights in the model; activations stay quantized."""
        self.weights.deliver(self.activations.values())
        for quantizer in self._all().values():
            quantizer.finish()
        self.hook.remove()

    def fingerprint(self) -> str:
        """Of all scales and zero points; the same on every rank and at any number of them."""
        return weights_fingerprint(nn.ModuleDict({p.replace(".", "/"): q for p, q in self._all().items()}))

    def _all(self) -> dict[str, FakeQuantize]:
        return {**self.activations, **self.parameters}

    def notes(self) -> list[str]:
        why = "quantization.reduce_range=true" if self.config.reduce_range else "this CPU has no int8 dot products"
        bits = [f"int8 weights have 7 bits: {why}"] if self.reduced else []
        return [*overrides(self.settings), *self.said, *bits, *checks.cut_off(self._all())]

    def metrics(self) -> dict[str, float]:
        return {"quantization/num_not_finite": float(self.observed.num_not_finite())}

    def undecayed(self) -> list[str]:
        """Learned scales: nothing but the loss may pull them."""
        quantizers = {id(q) for q in self._all().values()}
        modules = [(path, m) for path, m in self.context.model.named_modules() if id(m) in quantizers]
        return [f"{path}.{name}" for path, m in modules for name in m._parameters]

    def unsharded(self) -> list[str]:
        """Learned scales: small, and read by every rank."""
        return self.undecayed()

    def results(self) -> dict[str, Any]:
        """`quantization`, `sensitivity`: a row for each target, and each candidate of mixed precision;
        `fingerprint/scales`; `verify/quantized_max_rel_diff` of masked and shrunk model, where they were quantized."""
        found = {"quantization": self.rows, "sensitivity": self.mixed.rows, "fingerprint/scales": self.fingerprint()}
        return found if self.difference is None else {**found, "verify/quantized_max_rel_diff": self.difference}

    def state_dict(self) -> dict[str, Any]:
        """Collective. Scales are in the state of the model; here is what they follow."""
        comm.check_equal("quantization scales", self.fingerprint(), self.step)
        observed = self.observed.state_dict() if self.begun else {}
        own = {"begun": self.begun, "step": self.step, "difference": self.difference, "mixed": self.mixed.rows}
        return {**own, "observers": observed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.difference = int(state["step"]), state["difference"]
        if not state["begun"]:
            return
        self.mixed.rows = state["mixed"]
        self.mixed.apply()
        self.observed.load_state_dict(state["observers"])
        self.weights.follow()
        self._put_on()
