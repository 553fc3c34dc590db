"""One model on one example input, looked at once: its tape and its constraint system, for coupling and plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup import custom
from dist_compress.speedup.constraints import build
from dist_compress.speedup.masking import masked
from dist_compress.speedup.norms import norm_leaves
from dist_compress.speedup.settings import Settings
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import ModuleCall, Op, Trace, trace
from dist_compress.tracing.attribute_uses import Use, attribute_uses, has_uses
from dist_compress.tracing.size_reads import names_a_size
from dist_compress.tracing.unwrap import unwrapped
from dist_compress.tracing.walk import each_module, modules_of, parameters_of


class Capture:
    """Made by `capture`. `trace` and `structure` are made at first use; the model must not change its shape since.

    Changed weights are no harm: what depends on them is read anew.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings):
        model = unwrapped(model)
        settings.kept_parameters(model)  # a wrong name is told before the work
        settings.barrier_modules(model)
        self.model, self.args, self.kwargs, self.settings = model, tuple(args), dict(kwargs), settings

    @cached_property
    def trace(self) -> Trace:
        """The tape of one run."""
        return self._trace(self.model, sizes=True)

    @cached_property
    def holds_no_size(self) -> bool:
        """Whether nothing but torch's own layers, which follow their weights, could know a size of a tensor."""
        if self.trace.reads_sizes or any(map(names_a_size, {type(module) for module in each_module(self.model)})):
            return False
        grouped = (op for op in self.trace.tape if op.name == "convolution" and op.arg("groups") != 1)
        modules = {type(self.model.get_submodule(op.module)).__module__ for op in grouped}
        leaves = any(isinstance(op.target, ModuleCall) for op in self.trace.tape)
        return not leaves and modules <= {"torch.nn.modules.conv"}

    @cached_property
    def structure(self) -> Structure:
        """What belongs together, whatever the weights are."""
        return build(self.trace, self.model, self.args, self.kwargs, self.settings)

    def trace_of(self, model: nn.Module) -> Trace:
        """A run of the captured model, or of a copy with other weights, as it is now."""
        return self._trace(model)

    def structure_of(self, model: nn.Module) -> Structure:
        """`structure` over a tape that holds all values of `model`: the captured one, or a copy with other weights."""
        again = self._trace(model, values=True)
        if "structure" in vars(self) and _same_program(again, self.trace):
            return replace(self.structure, trace=again)
        return build(again, model, self.args, self.kwargs, self.settings)  # first use, or code that looks at weights

    def values_of(self, model: nn.Module) -> dict[int, torch.Tensor]:
        """The values of a run of a copy with other weights, {} when it is not the captured program or has none."""
        if any(parameter.is_meta for parameter in parameters_of(modules_of(model)).values()):
            return {}
        again = self._trace(model, values=True)
        return again.values if _same_program(again, self.trace) else {}

    @cached_property
    def uses(self) -> list[Use] | None:
        """What integers of the model's modules were the size of; None when the model does not run alike with them."""
        if not has_uses(self.model):
            return []
        try:
            again, uses = attribute_uses(self.model, lambda: self._trace(self.model))
        except Exception:  # code that takes nothing but plain ints
            return None
        return uses if _same_program(again, self.trace) else None

    def _trace(self, model: nn.Module, values: bool = False, sizes: bool = False) -> Trace:
        norms = norm_leaves(model) if self.settings.norm != "keep" else None
        leaves = custom.is_leaf if norms is None else lambda module: custom.is_leaf(module) or norms(module)
        return trace(model, self.args, self.kwargs, values, leaves, sizes)


class Reference:
    """The masked model and its run, made when first asked for. `masks` as `masking.check_masks` returns them.

    The values of all tensors need much memory, so there is a run without them for what the model returns.
    """

    def __init__(self, given: Capture, masks: dict[str, torch.Tensor]):
        self.given, self.masks = given, masks

    @property
    def made(self) -> bool:
        return "structure" in vars(self)

    @cached_property
    def model(self) -> nn.Module:
        """The captured model, or a copy with masked weights."""
        return masked(self.given.model, self.masks) if self.masks else self.given.model

    @cached_property
    def structure(self) -> Structure:
        return self.given.structure_of(self.model)

    @cached_property
    def run(self) -> Structure | None:
        """The captured structure over the masked run; None when that is another program, with another structure."""
        if self.made:
            again = self.structure.trace
            left = {key: value for key, value in again.values.items() if not again.tensors[key].dependent}
            again = replace(again, values=left)
            del self.structure  # and with it the values, before another run needs memory
        else:
            again = self.given.trace_of(self.model)
        return replace(self.given.structure, trace=again) if _same_program(again, self.given.trace) else None

    def values(self) -> dict[int, torch.Tensor]:
        """The values of the masked run by the refs of the captured one; {} when these are not its refs."""
        structure = self.structure
        return structure.trace.values if structure.parent is self.given.structure.parent else {}


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    norm: str = "keep",
    keep: Iterable[str] = (),
    barrier: Iterable[str] = (),
) -> Capture:
    """What `coupling` and `plan` share about `model(*args, **kwargs)`. Rank 0 only; the work is done at first use.

    norm "keep" keeps normalised dims, "exact" exchanges norms for ones that divide by the old width, "plain" lets the
    width of norms change (and with it the function). `keep`: fqns or patterns of parameters and modules whose dims all
    stay. `barrier`: fqns or patterns of modules; what ops inside them touch stays. The first tensor of the input has
    the batch in dim 0. Raises UserError for settings and names that do not fit.
    """
    return Capture(model, args, kwargs or {}, Settings(norm=norm, keep=keep, barrier=barrier))  # type: ignore[arg-type]


def captured(
    model: nn.Module | Capture, args: tuple[Any, ...], kwargs: dict[str, Any] | None, settings: dict[str, Any]
) -> Capture:
    """The capture of a model, or the one given; it holds its own inputs and settings, so none may come with it."""
    if not isinstance(model, Capture):
        return capture(model, args, kwargs, **settings)
    defaults = Settings()
    changed = [name for name, value in settings.items() if value != getattr(defaults, name)]
    if args or kwargs or changed:
        named = ", ".join(changed) or "args and kwargs"
        raise UserError(f"{named}: a Capture holds its own; give them to capture(...), or give the model here.")
    return model


def _same_program(a: Trace, b: Trace) -> bool:
    """Whether two runs made the same calls on tensors of the same shapes."""
    if len(a.tape) != len(b.tape) or len(a.tensors) != len(b.tensors):
        return False
    return all(_same_call(x, y) for x, y in zip(a.tape, b.tape, strict=True)) and a.tensors == b.tensors


def _same_call(a: Op, b: Op) -> bool:
    if isinstance(a.target, ModuleCall) and isinstance(b.target, ModuleCall):
        b = replace(b, target=a.target)  # the module of a copy
    return a == b
