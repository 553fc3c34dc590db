"""Compressed weights by projection: one latent per parameter, the module sees a pure function of it.

Between optimizer step and forward `project` puts `fn(latent)` into the parameter, in place, so that the same
code serves every backend (DDP buckets and optimizer references stay valid; a shard is projected like a
whole). Before the optimizer step, and before a checkpoint, `restore` puts the latent back. Methods contribute
functions under a key; they are applied in the order of `KEYS`, so a mask comes before a quantizer whoever was
added first.

What a rank holds of a parameter, its latent and the tensors that functions see are one shape: that of
`layout.local`. All is local, but that `project` and `restore` let a layout `publish` what they wrote, which is
collective where the model computes with copies of what is stepped (ZeRO).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dist_compress.layout import Layout

KEYS = ("mask", "quant")  # the order in which the functions of one parameter are applied

Function = Callable[[torch.Tensor], torch.Tensor]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


class Masked:
    """A function of a latent: zero where `keep` (bool, broadcastable) is False, the same bits elsewhere.

    A bitwise and, on a byte a weight: as exact as masked_fill, whatever stands there, and some nine times as fast.
    """

    def __init__(self, keep: torch.Tensor) -> None:
        self.bits = -keep.to(torch.int8)  # all ones or all zeros, in any width

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        return self.apply_(latent.clone())

    def apply_(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place."""
        tensor.view(_INTEGERS[tensor.element_size()]).bitwise_and_(self.bits)
        return tensor


class Projection:
    """The latents of `model` and what the methods make of them. Tied parameters are one entry under any
    name."""

    def __init__(self, model: nn.Module, layout: Layout | None = None) -> None:
        """`layout`: who holds what; unless given, read off the parameters. A backend that partitions them in a way of
        its own sets it when it wraps the model."""
        self.model = model
        self.layout = layout or Layout(model)
        self.projected = False
        self._functions: dict[str, dict[str, Function]] = {}
        self._grad_masks: dict[str, Masked] = {}
        self._decays: dict[str, tuple[torch.Tensor, float]] = {}
        self._latents: dict[str, torch.Tensor] = {}
        # What was added or removed, the same on every rank; `_functions` is not: a mask that removes nothing here needs
        # none.
        self._spoken_of: set[str] = set()
        self._first: dict[str, str] = {}  # of every name of a parameter, as it was when somebody asked

    def add(self, name: str, key: str, fn: Function) -> None:
        """Let `fn(latent) -> compressed`, pure and of the latent's shape, act on parameter `name` from the
        next `project` on. Replaces what stands under `key`. Where one rank calls this, the others do or `remove`."""
        assert key in KEYS, f"unknown projection key {key!r}: one of {KEYS}"
        self._spoken_of.add(self.owner(name))
        self._functions.setdefault(self.owner(name), {})[key] = fn

    def remove(self, name: str, key: str) -> None:
        """Take the function of `key` away. The parameter keeps what it holds until the next `project`."""
        name = self.owner(name)
        self._spoken_of.add(name)
        functions = self._functions.get(name, {})
        functions.pop(key, None)
        if not functions and self._functions.pop(name, None) is not None and name in self._latents:
            if self.projected:
                self.layout.local(name).copy_(self._latents[name])
            del self._latents[name]

    def masks(self) -> dict[str, torch.Tensor]:
        """{parameter: bool, True = keep, broadcastable} of the masks that act."""
        found = {name: functions.get("mask") for name, functions in self._functions.items()}
        return {name: fn.bits.bool() for name, fn in found.items() if isinstance(fn, Masked)}

    def mask_grad(self, name: str, mask: torch.Tensor | None) -> None:
        """Let `edit_gradients` zero the gradient of `name` where `mask` (bool, broadcastable) is False; None: no
        more."""
        name = self.owner(name)
        if mask is None:
            self._grad_masks.pop(name, None)
        else:
            self._grad_masks[name] = Masked(mask)

    def decay_masked(self, name: str, mask: torch.Tensor | None, decay: float = 0.0) -> None:
        """Add `decay` times the latent to the gradient of `name` where `mask` (bool, broadcastable) is False; None: no
        more."""
        name = self.owner(name)
        if mask is None:
            self._decays.pop(name, None)
        else:
            self._decays[name] = mask, decay

    @torch.no_grad()
    def project(self) -> None:
        """latent := parameter, parameter := compressed. Does nothing when projected already."""
        if self.projected:
            return
        parameters = [self.layout.local(name) for name in self._functions]
        for name, parameter in zip(self._functions, parameters, strict=True):
            latent = self._latents.get(name)
            if latent is None or latent.shape != parameter.shape or latent.device != parameter.device:
                self._latents[name] = torch.empty_like(parameter)
        _copy([self._latents[name] for name in self._functions], parameters)
        for key in KEYS:  # of all parameters, as a function may look at another one: a norm that is folded
            for functions, parameter in zip(self._functions.values(), parameters, strict=True):
                function = functions.get(key)
                if isinstance(function, Masked):
                    function.apply_(parameter)
                elif function is not None:
                    parameter.copy_(function(parameter))
        if self._spoken_of:
            self.layout.publish()
        self.projected = True

    @torch.no_grad()
    def restore(self, publish: bool = True) -> None:
        """parameter := latent. Does nothing when restored already. `publish`: the model may be called before the
        optimizer's step."""
        if not self.projected:
            return
        _copy([self.layout.local(name) for name in self._latents], list(self._latents.values()))
        if self._spoken_of and publish:
            self.layout.publish()
        self.projected = False

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The latents are in the parameters inside; afterwards as before."""
        projected = self.projected
        self.restore()
        try:
            yield
        finally:
            if projected:
                self.project()

    @torch.no_grad()
    def edit_gradients(self) -> None:
        """Apply the gradient rules: after the reduction, before clipping."""
        for name, (mask, decay) in self._decays.items():
            grad = self.layout.grad(name)
            if grad is not None and decay:
                grad.add_(self.latent(name).masked_fill(mask, 0), alpha=decay)
        for name, mask in self._grad_masks.items():
            grad = self.layout.grad(name)
            if grad is not None:
                mask.apply_(grad)

    def latent(self, name: str) -> torch.Tensor:
        """What this rank holds of the latent of `name`, live: the parameter itself while restored or when nothing
        compresses it."""
        latent = self._latents.get(self.owner(name)) if self.projected else None
        return self.layout.local(name) if latent is None else latent

    @torch.no_grad()
    def before(self, name: str, key: str) -> torch.Tensor:
        """What the function of `key` is given: the latent after the functions before it. Local."""
        tensor = self.latent(name)
        for earlier in KEYS[: KEYS.index(key)]:
            function = self._functions.get(self.owner(name), {}).get(earlier)
            tensor = tensor if function is None else function(tensor)
        return tensor

    def finish(self) -> None:
        """Leave the compressed weights in the parameters for good and drop latents, functions and rules."""
        self.project()
        if self._spoken_of:  # what was removed while it was projected
            self.layout.publish()
        self._spoken_of.clear()
        self._functions.clear()
        self._grad_masks.clear()
        self._decays.clear()
        self._latents.clear()
        self.projected = False

    def owner(self, name: str) -> str:
        """The first name of the parameter that `name` stands for (they differ for tied parameters)."""
        parameter = self.model.get_parameter(name)
        first = self._first.get(name, "")
        module, _, key = first.rpartition(".")
        try:
            if first and getattr(self.model.get_submodule(module), key) is parameter:
                return first
        except AttributeError:  # it is gone
            pass
        firsts = {id(other): first for first, other in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        self._first = {name: firsts[id(other)] for name, other in every}
        return self._first[name]


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
