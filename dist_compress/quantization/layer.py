"""A layer as methods see it that change its weight, wherever its weight lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dist_compress import comm
from dist_compress.exchange import Exchange, Span
from dist_compress.projection import Projection
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.fuse import Fold


class Layer:
    """`keep`: bool, broadcastable to the weight: what was not pruned; None: all of it."""

    def __init__(
        self, name: str, module: nn.Module, quantizer: FakeQuantize, projection: Projection, fold: Fold | None
    ) -> None:
        """`quantizer`: of its weight, or where only that has the method of its input. `fold`: with its norm."""
        self.name, self.module, self.quantizer, self.fold = name, module, quantizer, fold
        self.projection, self.path = projection, projection.owner(f"{name}.weight")
        self.shape = projection.layout.shape(self.path)
        self.is_whole = projection.layout.is_whole(self.path)
        self.keep = projection.masks().get(self.path) if self.is_whole else None
        self.brought: torch.Tensor | None = None

    @property
    def method(self) -> str:
        return type(self.quantizer).__module__.rpartition(".")[2]

    @property
    def device(self) -> torch.device:
        return self.projection.latent(self.path).device

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        return torch.float32 if self.fold else self.projection.latent(self.path).dtype

    def read(self) -> torch.Tensor:
        """The weight as it will be quantized, masked and folded. Local; of a sharded layer only where it was brought
        to."""
        assert self.is_whole or self.brought is not None, f"{self.name} was not brought here"
        masked = self.projection.before(self.path, "quant") if self.brought is None else self.brought
        return self.fold.into(masked, self.fold.used_in(None)) if self.fold else masked

    def write(self, weight: torch.Tensor) -> None:
        """Put it back: of all of it, what this rank holds. Local."""
        whole = self.fold.out_of(weight, self.fold.used_in(None)) if self.fold else weight
        latent = self.projection.latent(self.path)
        latent.copy_(self.projection.layout.part(self.path, whole).reshape(latent.shape))


def bring(layers: Sequence[Layer], to: Mapping[str, int]) -> None:
    """Let rank `to[name]` read the sharded ones among the layers, until `leave`. Collective, if there are any: one
    exchange of weights, one of masks."""
    sharded = [layer for layer in layers if not layer.is_whole]
    if not sharded:
        return
    projection, me = sharded[0].projection, comm.rank()
    masks = projection.masks()

    def weights(path: str) -> torch.Tensor:
        return projection.before(path, "quant").reshape(-1)

    def kept(path: str) -> torch.Tensor:
        return masks[path].expand(projection.latent(path).shape).reshape(-1)

    brought = _exchanged([(layer.path, to[layer.name]) for layer in sharded], projection, weights)
    pruned = [(layer.path, to[layer.name]) for layer in sharded if layer.path in masks]
    keep = _exchanged(pruned, projection, kept)
    for layer in sharded:
        if to[layer.name] == me:
            layer.brought, layer.keep = brought[layer.path], keep.get(layer.path)


def leave(layers: Sequence[Layer]) -> None:
    """What was brought here is not needed any more. Local."""
    for layer in layers:
        if not layer.is_whole:
            layer.brought = layer.keep = None


def _exchanged(wanted: Sequence[tuple[str, int]], projection: Projection, read) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """{parameter: all of it} of those that this rank wants. `wanted`: (parameter, by which rank); `read(parameter)`:
    what this rank holds, flat. Collective unless nothing is sent."""
    layout = projection.layout
    spans = {path: Span(path, 0, layout.shape(path).numel()) for path, _ in wanted}
    wants = [[spans[p] for p in dict.fromkeys(p for p, to in wanted if to == r)] for r in range(comm.world_size())]
    exchange = Exchange({path: layout.holdings(path) for path in spans}, wants)
    packed = any(read(path).dtype == torch.bool for path in list(spans)[:1])
    found = exchange.move(exchange.pick(read), read, packed)
    return {s.name: flat.view(layout.shape(s.name)) for s, flat in zip(exchange.wants, found, strict=True)}
