"""What quantizers keep when the model is shrunk: each block of the smaller tensor has what its elements' block had.

Of a parameter the number of each element's block is sliced along with it. An activation has nothing that a plan could
slice, so while the plan is made it is multiplied by a buffer of ones, its mark, which is sliced with its channels.
Everything is local, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_compress import call_sites
from dist_compress.method import Context
from dist_compress.quantization.deploy import name_of
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.granularity import block_numbers, carried, rows
from dist_compress.quantization.setting import Setting
from dist_compress.sites import Sites, replace

Transform = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class Mark:
    """Multiplies what goes by with the ones that a module holds. (It knows the module, so that a deep copy of the model
    acts with the ones of the copy.)"""

    def __init__(self, module: nn.Module, buffer: str) -> None:
        self.module, self.buffer = module, buffer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * getattr(self.module, self.buffer).to(x.dtype)


class Marks:
    """Those of the activations that have several scales, from their making to `take_off`."""

    def __init__(self, model: nn.Module, activations: Mapping[str, FakeQuantize]) -> None:
        self.model = model
        self.places: dict[str, tuple[str, str]] = {}  # (module, buffer)
        self.handles: list[RemovableHandle] = []
        for path, quantizer in activations.items():
            if quantizer.scale.numel() > 1:
                self._put_on(path, quantizer)

    def _put_on(self, path: str, quantizer: FakeQuantize) -> None:
        (where, target), device = quantizer.place, quantizer.scale.device
        module, buffer = self.model.get_submodule(where), f"quantizer_mark{target.replace('.', '_')}"
        module.register_buffer(buffer, torch.ones(_cut_dims(quantizer)[1:], device=device), persistent=False)
        self.handles.append(replace(module, target, Mark(module, buffer), where))
        self.places[path] = where, buffer

    def names(self) -> dict[str, str]:
        """{path of the activation: full name of the buffer}."""
        return {path: f"{where}.{buffer}".lstrip(".") for path, (where, buffer) in self.places.items()}

    def take_off(self) -> None:
        for handle in self.handles:
            handle.remove()
        for where, buffer in self.places.values():
            delattr(self.model.get_submodule(where), buffer)
        self.places, self.handles = {}, []


class Shrink:
    """A model without its quantizers, from `detach` to `rebase`."""

    def __init__(self, context: Context, activations: Mapping[str, FakeQuantize]) -> None:
        self.context, self.activations = context, activations
        self.marks = Marks(context.model, activations)
        self.calls = call_sites.describe(context.model)
        call_sites.hide(context.model, {where for where, _ in self.marks.places.values()})

    def added(self) -> list[str]:
        """Names of the buffers that are in the model meanwhile."""
        return list(self.marks.names().values())

    def cut(
        self, settings: Sequence[Setting], parameters: Mapping[str, FakeQuantize], transform: Transform
    ) -> dict[str, torch.Tensor]:
        """The model was: cut the quantizers like it. Returns the members of each block of those with several. Raises
        UserError."""
        model, owner = self.context.model, self.context.projection.owner
        assert self.context.example is not None
        call_sites.restore(model, self.calls)
        sites = Sites(model, *self.context.example)
        shapes = {s.path: sites.site(s.module, s.target).shape for s in settings if s.is_activation}
        members = resize(self.activations, self.marks.names(), shapes, transform)
        self.marks.take_off()
        sizes = {path: model.get_parameter(path).shape for path in parameters}
        return members | resize(parameters, {path: owner(path) for path in sizes}, sizes, transform)


def _cut_dims(quantizer: FakeQuantize) -> list[int]:
    """The shape of the activation, 1 where a block has all of a dim. The batch is one."""
    sizes = quantizer.spec.granularity.sizes(quantizer.shape)
    return [1 if k == n else n for n, k in zip(quantizer.shape, sizes, strict=True)]


def resize(
    quantizers: Mapping[str, FakeQuantize], names: Mapping[str, str], shapes: Mapping[str, Sequence[int]],
    transform: Transform,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Cut the quantizers to `shapes`, those of the shrunk model. `names`: of the parameter or of the mark, for
    `transform`. Returns the members of each block, as in `carried`, of those with several. Raises UserError where
    blocks do not fit any more."""
    found = {}
    for path, quantizer in quantizers.items():
        granularity = quantizer.spec.granularity
        if quantizer.scale.numel() > 1:
            full = _cut_dims(quantizer) if quantizer.spec.is_activation else quantizer.shape
            numbers = block_numbers(full, granularity)
            numbers = numbers[0] if quantizer.spec.is_activation else numbers  # a mark has no batch
            numbers = transform({names[path]: numbers})[names[path]]
            granularity.check(shapes[path], f"{path} in the shrunk model (speedup.round_to keeps what fits)")
            numbers = numbers[None] if quantizer.spec.is_activation else numbers
            found[path] = rows(numbers, granularity).long().to(quantizer.scale.device)
        quantizer.resize(shapes[path], found.get(path))
    return found


def follow(
    quantizers: Mapping[str, FakeQuantize], members: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """{parameter name: tensor shaped like it was} with those of quantizers that were resized cut like these."""
    found = dict(tensors)
    for path, quantizer in quantizers.items():
        where, target = quantizer.place
        for name, parameter in quantizer.named_parameters(recurse=False):
            full = f"{where}.{name_of(target)}.{name}".lstrip(".")
            if full in found and parameter.shape == quantizer.scale.shape:
                found[full] = carried(found[full], members[path]).view_as(parameter)
    return found
