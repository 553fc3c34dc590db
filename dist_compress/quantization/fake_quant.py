"""One tensor's quantizer: its scale and zero point, where they come from, and what the tensor becomes.

A method is a subclass, alone in a file of `methods/` beside its dataclass `Options`. For an activation the module is
called in the data flow. For a weight `compress` is what the projection applies, and the gradient with respect to the
compressed weight is turned into that of the latent by `weight_gradient`. Scale and zero point are buffers (or, where
they are learned, a parameter), so they are in every checkpoint of the model.

Of a sharded parameter `compress`, `statistic`, `gradient_sums` and `weight_gradient` see what this rank holds, inside
of `showing(holding)`; what they ask of whole blocks (`scales_for`, `extent`, `block_sums`) knows of it. Weights.follow
and Weights.gradients reduce what belongs together between the two steps of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.quantization.affine import EPS, fake_quantize, in_range, qparams, simulate
from dist_compress.quantization.apply_method import Own
from dist_compress.quantization.dtypes import QuantDtype
from dist_compress.quantization.granularity import Granularity, carried, extent, mixed, rows, spread
from dist_compress.quantization.holding import Holding
from dist_compress.quantization.observer import Measured, Observer
from dist_compress.quantization.search import STEPS
from dist_compress.recompute import recomputing


@dataclass(frozen=True)
class Spec:
    """How a tensor is quantized, whatever the method."""

    dtype: QuantDtype
    scheme: str
    granularity: Granularity
    masked: bool  # the gradient stops where a value is clipped: qat_clamp_round
    is_activation: bool
    own: Own | None = None  # a rule of the user's, instead of both


class FakeQuantize(nn.Module):
    """The base: a range taken from an observer (activations) or from the tensor itself (parameters)."""

    trains = True  # the model is trained with it; False: it is put on when training is over
    refits = True  # the range of a parameter is taken from it again at every step
    activations = True  # False: only parameters can be its targets
    elementwise = True  # what becomes of a weight depends on it and on the scale alone
    folds = True  # the weight is quantized as it is when the norm behind it is folded
    mixes = True  # the dtype of a weight may still change when the calibration is over
    binary = False  # quant_dtype: binary is possible
    reduced_by = "max"  # `statistic` over the ranks: or "sum"
    # What "default" means: for parameters (the scheme: those of a signed dtype), for activations, for both.
    weight_dtype, weight_scheme, weight_granularity = "int8", "symmetric_restricted", "out_channel"
    activation_dtype = "uint8"
    apply_method = "qat_clamp_round"  # another name than those of config_list.APPLY: a rule of the method's own

    scale: torch.Tensor
    zero_point: torch.Tensor
    holding: Holding | None = None  # what of a parameter its tensors are; None: all of it

    def __init__(self, spec: Spec, shape: Sequence[int], options: Any, device: torch.device | str = "cpu") -> None:
        """`shape`: of the parameter, or of the activation on an example."""
        super().__init__()
        self.spec, self.options, self.shape = spec, options, tuple(shape)
        self.place: tuple[str, str] = ("", "")  # (module, target) where it was installed
        scale_shape = (1,) if spec.granularity.dynamic else spec.granularity.scale_shape(shape)
        self.register_buffer("scale", torch.ones(scale_shape, device=device))
        self.register_buffer("zero_point", torch.zeros(scale_shape, dtype=torch.int32, device=device))
        observed = spec.is_activation and not spec.granularity.dynamic
        self.observer: Observer | None = self.new_observer(shape, device) if observed else None
        self.enabled = False  # what comes out is quantized
        self.hearing = False  # what comes in is observed
        self.measured: list[Measured] = []  # by this forward pass, not yet counted
        self.cut_off = 0.0  # the smallest value of the calibration, where it is negative and the method has only others
        self.watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None  # is shown (before, after)

    def new_observer(self, shape: Sequence[int], device: torch.device | str) -> Observer | None:
        """The observer of an activation; None: its scale is known without."""
        return Observer(self.spec.granularity, shape, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The activation as the next module sees it, of the shape and dtype of `x`."""
        if self.hearing and self.observer is not None and not recomputing():
            self.measured.append(self.observer.measure(x))
        if not self.enabled:
            return x
        out = self.quantized(x, *self.scales_for(x))
        if self.watch is not None:
            self.watch(x, out)
        return out

    def scales_for(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point that broadcast to `x`."""
        if self.spec.granularity.dynamic:
            low, high = torch.aminmax(x.detach().float(), dim=-1, keepdim=True)
            return qparams(low, high, self.spec.dtype, self.spec.scheme)
        return self.spread(self.scale, x.shape), self.spread(self.zero_point, x.shape)

    @contextmanager
    def showing(self, holding: Holding | None) -> Iterator[None]:
        """Inside, tensors of a parameter are what this rank holds of it."""
        self.holding = holding
        try:
            yield
        finally:
            self.holding = None

    def spread(self, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Of a tensor in the shape of the scale what broadcasts to a tensor of `shape`."""
        return self.holding.spread(values) if self.holding else spread(values, shape, self.spec.granularity)

    def extent(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest value of each block, [blocks], of what of a parameter is at hand."""
        return self.holding.extent(x) if self.holding else extent(x, self.spec.granularity)

    def block_sums(self, x: torch.Tensor) -> torch.Tensor:
        """float64 [blocks], of what of a parameter is at hand."""
        return self.holding.sums(x) if self.holding else rows(x.double(), self.spec.granularity).sum(1)

    def quantized(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Fake-quantized, with the gradient of the method."""
        if self.spec.own is not None:
            return self.spec.own(x, scale, zero_point, self.spec.dtype)
        return simulate(x, scale, zero_point, self.spec.dtype, self.spec.masked)

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Scale and zero point of ranges [low, high], of the scale's shape. Local."""
        scale, zero_point = qparams(low, high, self.spec.dtype, self.spec.scheme)
        with torch.no_grad():
            self.scale.copy_(scale.view_as(self.scale))
            self.zero_point.copy_(zero_point.view_as(self.zero_point))

    def begin(self) -> None:
        """The calibration is over: take the range of an activation from it. Local, the same on every rank."""
        if self.observer is not None:
            self.set_range(*self.observer.range())

    def follow(self) -> None:
        """A training step was observed: take the range of the next one from it. Local, the same on every rank."""
        if self.observer is not None:
            self.set_range(*self.observer.range())

    def before_step(self) -> None:
        """The gradients are reduced: add to those of what is learned for an activation. Local, the same on every
        rank."""

    def stepped(self, latent: torch.Tensor | None) -> None:
        """The optimizer has made a step: bring what depends on it in line. `latent`: of a parameter, live. Local."""

    def finish(self) -> None:
        """No step follows: scale and zero point are buffers from here on, and nothing is learned. Local."""
        for name in list(self._parameters):
            value = self._parameters.pop(name)
            if name == "scale" and value is not None:
                self.register_buffer("scale", value.detach().clamp(min=EPS))
        self.observer, self.hearing = None, False

    def resize(self, shape: Sequence[int], members: torch.Tensor | None) -> None:
        """The tensor was cut to `shape`: keep of each block what it has, be it buffer or parameter. `members` as in
        `carried`; None: it is one block, as before. Local."""
        self.shape, old = tuple(shape), self.scale.shape
        if members is None:
            return
        new = self.spec.granularity.scale_shape(shape)
        for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            if tensor.shape == old:
                cut = carried(tensor.detach(), members).view(new)
                setattr(self, name, nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut)
        if self.observer is not None:
            self.observer.resize(new, members)

    def refit(self, weight: torch.Tensor, members: torch.Tensor) -> None:
        """Take the ranges of blocks whose members come from several others from the parameter, unless they are learned.
        After `resize`. Local."""
        several = mixed(members).view_as(self.scale)
        if isinstance(self.scale, nn.Parameter) or not bool(several.any()):
            return
        scale, zero_point = self.scale.clone(), self.zero_point.clone()
        self.fit(weight)
        self.scale.copy_(torch.where(several, self.scale, scale))
        self.zero_point.copy_(torch.where(several, self.zero_point, zero_point))

    def fit(self, weight: torch.Tensor) -> None:
        """Take the range of a parameter, all of it, from it, before it is compressed. Masked weights are zeros: they
        must not count. Local."""
        self.take(self.statistic(weight))

    def statistic(self, weight: torch.Tensor) -> torch.Tensor:
        """What the range of a parameter is taken from where it `refits`: [k, blocks], of what of it is at hand, to be
        reduced over the ranks by `reduced_by`. Local."""
        low, high = self.extent(weight.detach().float())
        return torch.stack([-low, high])

    def take(self, statistic: torch.Tensor) -> None:
        """Take the range from `statistic`, reduced. Local, the same on every rank."""
        self.set_range(-statistic[0], statistic[1])

    @torch.no_grad()
    def compress(self, weight: torch.Tensor) -> torch.Tensor:
        """A parameter as the model sees it, of the same shape and dtype, with scale and zero point as they are."""
        apply = self.spec.own or fake_quantize
        return apply(weight, *self.scales_for(weight), self.spec.dtype)

    def gradient_sums(self, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
        """What `weight_gradient` has to know of whole blocks: float64 [k, blocks], to be summed over the ranks. None of
        any: nothing. Local."""
        return None

    @torch.no_grad()
    def weight_gradient(self, weight: torch.Tensor, grad: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        """From the reduced gradient with respect to what `compress(weight)` gave, that with respect to `weight`.
        `sums`: `gradient_sums`, reduced; of these learned scales get theirs, the same on every rank."""
        if self.spec.own is not None:
            return self.spec.own.gradient(weight, *self.scales_for(weight), self.spec.dtype, grad)
        if not self.spec.masked or self.refits:  # a range that is the weight's own clips nothing
            return grad
        return grad * in_range(weight, *self.scales_for(weight), self.spec.dtype)


WEIGHT_OBSERVERS = ("min_max", "mse")


def weight_range(weight: torch.Tensor, spec: Spec, observer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 low and high, [blocks], of a weight whose range is that of its values, or the part of it with the
    smallest squared error ("mse"; of floats there is only the former)."""
    if observer == "mse" and not spec.dtype.is_float:
        return best_range(weight, spec)
    return extent(weight.detach().float(), spec.granularity)


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError unless an option of a method is one of `choices`."""
    if value not in choices:
        raise UserError(f"quantization.options.{key}={value!r}: no such choice. Available: {', '.join(choices)}.")


def best_range(weight: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block the range k / STEPS of its own extent with the smallest squared error, the widest of equals."""
    cut = rows(weight.detach().float(), spec.granularity)
    low, high = torch.aminmax(cut, dim=1, keepdim=True)
    best = torch.full_like(low, float("inf"), dtype=torch.float64)
    share = torch.ones_like(low)
    for k in range(STEPS, STEPS // 5, -1):
        scale, zero_point = qparams(low * (k / STEPS), high * (k / STEPS), spec.dtype, spec.scheme)
        error = (cut - fake_quantize(cut, scale, zero_point, spec.dtype)).double().square().sum(1, keepdim=True)
        share = torch.where(error < best, k / STEPS, share)
        best = torch.minimum(best, error)
    return (low * share)[:, 0], (high * share)[:, 0]
