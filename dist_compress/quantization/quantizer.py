"""The quantizer: puts fake quantizers on the targets, keeps their scales, and leaves a model that can be deployed.

    attach       modules for activations are hooked into the data flow; nothing is quantized yet
    rounds       methods that change weights hear what layers are called with, and change them (preparing.py)
    calibrate    forward passes are observed (training/calibration.py), float
    begin        ranges are known: everything is quantized from here on
    train        methods that train: each step is observed, and its ranges are those of the next
    detach       norms are folded, weights are what integer kernels will hold

Weights are compressed by projection, so between optimizer step and forward; their latents are trained. All observers
share one MAX and one SUM collective a step. Scales are the same on every rank, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.config_list import overrides
from dist_compress.duration import duration
from dist_compress.errors import UserError
from dist_compress.fingerprint import weights_fingerprint
from dist_compress.method import Context, Method
from dist_compress.quantization import cpu, fuse, preparing
from dist_compress.quantization.config_list import build as build_quantizer
from dist_compress.quantization.config_list import fake_quantize_class, resolve, spec_of
from dist_compress.quantization.deploy import install
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.heard import Heard
from dist_compress.quantization.observer import reduce
from dist_compress.quantization.setting import Setting
from dist_compress.quantization.table import Row, table
from dist_compress.sites import Sites


def build(config: Config) -> Quantizer | None:
    """The quantizer of the run, if any: all entries of the config list, whatever their methods."""
    wanted = config.quantization.method is not None or any(
        isinstance(entry, dict) and entry.get("method") is not None for entry in config.quantization.config_list
    )
    return Quantizer(config) if wanted else None


class Quantizer(Method):
    """Targets by `quantization.config_list`. Attached late: when the model has its final shape."""

    def __init__(self, config: Config) -> None:
        self.config = config.quantization
        self.calibrating = self.begun = False
        self.rows: list[Row] = []
        self.said: list[str] = []  # by methods that changed weights

    def foresee(self, model: nn.Module, example: Any) -> dict[tuple[str, str], Spec]:
        """{(module, target): how it will be quantized}, of a model that is not in its final shape yet. Local, the same
        on every rank. Raises UserError for what is wrong with the configuration whatever the shape."""
        sites = Sites(model, *example)
        settings = resolve(self.config, model, sites)
        return {(setting.module, setting.target): spec_of(setting, model, sites)[0] for setting in settings}

    def attach(self, context: Context) -> None:
        """Find the targets, fuse layers with their norms, hook the quantizers in. Collective. Raises UserError."""
        assert context.example is not None
        self.context, model = context, context.model
        args, kwargs = context.example
        sites = Sites(model, args, kwargs)
        self.reduced = self.config.reduce_range
        if self.reduced is None:
            self.reduced = comm.on_rank0(cpu.needs_reduced_range) and "onnx" in context.config.export
        self.settings = resolve(self.config, model, sites, self.reduced)
        self._check_methods()
        layers = [s.module for s in self.settings if s.target == "weight" and fake_quantize_class(s).folds]
        wanted = [names for s in self.settings for names in s.fuse_names]
        fused = comm.on_rank0(lambda: fuse.find(sites, layers, wanted))
        self.fused = {f.layer: f for f in fused}
        self.folds = {
            f.layer: fuse.Fold(model.get_submodule(f.layer), model.get_submodule(f.norm)) for f in fused if f.norm
        }
        self._check_norms()
        self.activations: dict[str, FakeQuantize] = {}
        self.parameters: dict[str, FakeQuantize] = {}
        for setting in self.settings:
            quantizer = build_quantizer(setting, model, sites)
            where = setting.module
            if setting.target == "_output_0" and where in self.fused:
                where = self.fused[where].last  # what the fused kernel puts out
            (self.activations if setting.is_activation else self.parameters)[setting.path] = quantizer
            install(model, where, setting.target, quantizer)
        preparing.check(model, self.parameters)
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.freeze = duration(
            self.config.freeze, "quantization.freeze", context.total_steps, context.steps_per_epoch
        )
        self.step = 0
        self.hook = model.register_forward_pre_hook(self._begin_pass)

    def _check_methods(self) -> None:
        kinds = {setting.method: fake_quantize_class(setting).trains for setting in self.settings}
        if len(set(kinds.values())) > 1:
            late = " and ".join(name for name, trains in kinds.items() if not trains)
            raise UserError(
                f"quantization.config_list: methods {', '.join(kinds)} in one run: {late} quantizes a model whose "
                "training is over, the others train with their scales. Use one kind."
            )

    def _check_norms(self) -> None:
        """A norm that is folded is no tensor of the deployed model, nor is what goes into it."""
        norms = {f.norm: f.layer for f in self.fused.values() if f.norm}
        for setting in self.settings:
            if setting.module in norms and setting.target != "_output_0":
                raise UserError(
                    f"{setting.sources['']}: {setting.path} is folded into {norms[setting.module]} and does not exist "
                    "when the model is deployed. Leave it out; _output_0 is possible."
                )

    def begins_at(self, total_steps: int, steps_per_epoch: float, shrink: int | None) -> int:
        """The step boundary of calibration and begin. `shrink`: that of the shrink, if any. Raises UserError."""
        start = self.config.start
        if start is None:
            return (shrink or 0) if self._any_trains() else total_steps
        step = duration(start, "quantization.start", total_steps, steps_per_epoch)
        if step < total_steps and not self._any_trains():
            raise UserError(
                f"quantization.start={start!r} is step {step} of {total_steps}, but the method is for a model whose "
                "training is over. Leave it null, or choose one that trains, such as qat."
            )
        if shrink is not None and step < shrink:
            raise UserError(
                f"quantization.start={start!r} is step {step}, before the model is shrunk at step {shrink}. Quantize "
                "the small model: raise it, leave it null, or end pruning earlier."
            )
        if step > total_steps:
            raise UserError(f"quantization.start={start!r} is step {step}, but the run has {total_steps}. Lower it.")
        return step

    def _any_trains(self) -> bool:
        methods = [self.config.method, *(e.get("method") for e in self.config.config_list if isinstance(e, dict))]
        sources = [Setting("", "", method=str(name)) for name in methods if name is not None]
        return any(fake_quantize_class(setting).trains for setting in sources)

    def rounds(self) -> Iterator[tuple[Heard | Quantizer, int]]:
        """What has to be shown the calibration data before `begin`, one after the other, and how many global batches
        of it. Whatever changes weights has done so before the next is given out. Every step is collective."""
        for listener in preparing.rounds(self.context, self._all().values(), self.folds, self.said):
            yield listener, self.config.calibration_steps
        if any(q.observer is not None for q in self.activations.values()):
            yield self, self.config.calibration_steps

    def _begin_pass(self, model: nn.Module, args: Any) -> None:
        """A forward pass begins: what an evaluation or a dummy round left behind is dropped."""
        hearing = self.calibrating or (self.begun and model.training and self.step < self.freeze)
        for quantizer in self.activations.values():
            quantizer.hearing = hearing
            quantizer.measured.clear()
        if self.begun and model.training and self.step >= self.freeze:
            for norm in self.norms:
                norm.training = False

    def count_pass(self) -> None:
        """The forward pass belongs to a live micro-batch: it counts. Local."""
        for quantizer in self.activations.values():
            for measured in quantizer.measured:
                assert quantizer.observer is not None
                quantizer.observer.fold(measured)
            quantizer.measured.clear()

    def end_step(self) -> None:
        """All micro-batches of the step were counted. Collective: two collectives, or none without observers."""
        reduce([q.observer for q in self.activations.values() if q.observer is not None])

    def begin(self) -> None:
        """The calibration is over: quantize from here on. Collective. Raises UserError where nothing, or nothing
        finite, was seen, and for pruned weights of a dtype without a zero."""
        masked = self.context.projection.masks()
        for path, quantizer in self.parameters.items():
            if quantizer.spec.dtype.is_binary and self.context.projection.owner(path) in masked:
                raise UserError(
                    f"{path}: quant_dtype=binary has no zero for its pruned weights. Prune channels that are shrunk "
                    "away, exclude it from pruning, or choose another dtype such as int2."
                )
        for path, quantizer in self.activations.items():
            _check_observed(path, quantizer)
            quantizer.begin()
        with self.context.projection.lifted():
            for path, quantizer in self.parameters.items():
                quantizer.fit(self._folded(path))
            self._put_on()
        comm.check_equal("quantization scales", self.fingerprint(), self.step)

    def _put_on(self) -> None:
        for quantizer in (*self.activations.values(), *self.parameters.values()):
            quantizer.enabled = True
        for path, quantizer in self.parameters.items():
            self.context.projection.add(path, "quant", _compressing(quantizer, self._fold_of(path)))
        self.begun = True

    def _fold_of(self, path: str) -> fuse.Fold | None:
        module, target = self.parameters[path].place
        return self.folds.get(module) if target == "weight" else None

    def _folded(self, path: str) -> torch.Tensor:
        """The latent as it is quantized."""
        latent, fold = self.context.projection.latent(path), self._fold_of(path)
        return latent if fold is None else fold.into(latent)

    def after_backward(self, step: int, micro: int) -> None:
        if self.begun:
            self.count_pass()

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for quantizer in self.activations.values() if self.begun else ():
            quantizer.before_step()
        for path, quantizer in self.parameters.items() if self.begun else ():
            parameter, fold = self.context.model.get_parameter(path), self._fold_of(path)
            if parameter.grad is None:
                continue
            if fold is None:
                grad = quantizer.weight_gradient(self._folded(path), parameter.grad)
            else:  # the parameter holds Q(v) / f of v = w * f
                grad = fold.into(quantizer.weight_gradient(self._folded(path), fold.out_of(parameter.grad)))
            parameter.grad.copy_(grad)

    def after_step(self, step: int) -> None:
        """Ranges of the step become those of the next. Collective, on the steps that are observed."""
        self.step = step + 1
        if self.begun and step < self.freeze:
            self.end_step()
            for quantizer in self.activations.values():
                if quantizer.observer is not None:
                    quantizer.follow()
        for path, quantizer in self._all().items() if self.begun else ():
            latent = self.context.projection.latent(path) if path in self.parameters else None
            quantizer.stepped(latent)

    @contextmanager
    def float_activations(self) -> Iterator[None]:
        """Inside, only parameters are quantized: what is left is linear between norms, and can be compared."""
        for quantizer in self.activations.values():
            quantizer.enabled = False
        try:
            yield
        finally:
            for quantizer in self.activations.values():
                quantizer.enabled = True

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Fill the table of tensors from one call of the model, before `detach`. Local, the same on every rank."""
        self.rows = table(self.context.model, self.activations, self.parameters, self._folded, args, kwargs)

    @torch.no_grad()
    def detach(self) -> None:
        """Fold the norms and leave the quantized weights in the model; activations stay quantized."""
        model, projection = self.context.model, self.context.projection
        projection.project()
        held = {path: model.get_parameter(path).detach().clone() for path in self.parameters}
        for path in self.parameters:
            projection.remove(path, "quant")
        for path, quantizer in self.parameters.items():
            fold, parameter = self._fold_of(path), model.get_parameter(path)
            if fold is None:
                parameter.copy_(held[path])
                continue
            fused = self.fused[quantizer.place[0]]
            fuse.fold(model, fused, quantizer.compress(fold.into(held[path])))
            for other in self.activations.values():
                if other.place[0] == fused.norm:  # its hook went with the norm
                    install(model, *other.place, other)
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
        cut = [
            f"{path}: what is negative becomes 0, {q.spec.dtype.name} begins there and {q.cut_off:.3g} was seen. "
            "Choose a signed dtype, or a method with a zero point such as lsq_plus"
            for path, q in self._all().items()
            if q.cut_off < 0
        ]
        bits = [f"int8 weights have 7 bits: {why}"] if self.reduced else []
        return [*overrides(self.settings), *self.said, *bits, *cut]

    def metrics(self) -> dict[str, float]:
        bad = sum(int(q.observer.counts[1]) for q in self.activations.values() if q.observer is not None)
        return {"quantization/num_not_finite": float(bad)}

    def undecayed(self) -> list[str]:
        """Learned scales: nothing but the loss may pull them."""
        quantizers = {id(q) for q in self._all().values()}
        modules = [(path, m) for path, m in self.context.model.named_modules() if id(m) in quantizers]
        return [f"{path}.{name}" for path, m in modules for name in m._parameters]

    def results(self) -> dict[str, Any]:
        return {"quantization": self.rows, "fingerprint/scales": self.fingerprint()}

    def state_dict(self) -> dict[str, Any]:
        """Collective. Scales are in the state of the model; here is what they follow."""
        comm.check_equal("quantization scales", self.fingerprint(), self.step)
        observed = {path: q.observer.state_dict() for path, q in self.activations.items() if q.observer is not None}
        return {"observers": observed, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        for path, quantizer in self.activations.items():
            if path in state["observers"] and quantizer.observer is not None:
                quantizer.observer.load_state_dict(state["observers"][path])
            else:
                quantizer.observer = None  # its scale is learned
        self._put_on()


def _compressing(quantizer: FakeQuantize, fold: fuse.Fold | None) -> Callable[[torch.Tensor], torch.Tensor]:
    def compress(latent: torch.Tensor) -> torch.Tensor:
        weight = latent if fold is None else fold.into(latent)
        if quantizer.refits:
            quantizer.fit(weight)
        compressed = quantizer.compress(weight)
        return compressed if fold is None else fold.out_of(compressed)

    return compress


def _check_observed(path: str, quantizer: FakeQuantize) -> None:
    """The same on every rank, from reduced counts."""
    observer = quantizer.observer
    if observer is None:
        return
    seen, bad = observer.counts.tolist()
    if bad:
        raise UserError(
            f"{path}: {bad} of {seen} values are NaN or infinite on the calibration data. The model or the data is "
            "broken; look at the float model first."
        )
    if observer.empty:
        raise UserError(
            f"{path}: no calibration data reached it ({seen} values seen). Raise quantization.calibration_steps, or "
            "exclude the module."
        )
