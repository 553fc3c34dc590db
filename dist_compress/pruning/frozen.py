"""Masks after the last decision, taken along through a shrink."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dist_compress.layout import Layout
from dist_compress.parts import Parts

Masks = dict[str, torch.Tensor]


class Frozen:
    """What this rank holds of them, {parameter: bool, True = keep}."""

    def __init__(self, layout: Layout, masks: Masks) -> None:
        """`masks`: broadcastable to what this rank holds."""
        self.masks = {name: mask.expand(layout.local(name).shape) for name, mask in masks.items()}
        self._before = Parts.of(layout, self.masks)
        self._transform: Callable[[Masks], Masks] | None = None

    def rebase(self, transform: Callable[[Masks], Masks]) -> None:
        """The model was sliced: as `transform({name: whole mask})` does it. Local."""
        self._transform = transform

    def settle(self, layout: Layout) -> None:
        """The sliced model is as it will be trained, `layout` tells who holds what of it. Collective if it is sharded,
        one mask after the other."""
        assert self._transform is not None, "rebase before"
        for name in list(self.masks):
            mask = layout.part(name, self._transform({name: self._before.whole(name).contiguous()})[name])
            # What the shrink folded into a masked bias is no zero any more.
            self.masks[name] = mask.reshape(layout.local(name).shape) | (layout.local(name) != 0)
