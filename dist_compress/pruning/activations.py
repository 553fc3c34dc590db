"""Activations as targets of pruning: how each is cut into units, and their masks.

    per_channel      a unit for each index of the channel dim (blocks.activation_dim), whatever the other sizes are
    element, [4, 4]  blocks of what lies behind the samples, whose sizes then have to be the same at every call

Dim 0 holds the samples and is never cut. A mask acts where the activation is made (activation_mask.py), before and
after decisions alike. What speedup removes is gone with its channels; what is left is folded into weights where that
is exact (folding.py), or stays in the model as a mask. Everything here is local.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_compress.blocks import Blocks, activation_dim
from dist_compress.errors import UserError
from dist_compress.hashing import splitmix64
from dist_compress.layout import Layout, device_of
from dist_compress.pruning.activation_mask import PREFIX, install
from dist_compress.pruning.folding import fold
from dist_compress.pruning.mask import Mark
from dist_compress.pruning.setting import Setting
from dist_compress.pruning.units import UnitSet
from dist_compress.sites import Site, Sites
from dist_compress.target import Member

Masks = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Activation:
    """One activation that is a target or aligned."""

    setting: Setting
    site: Site
    dim: int  # of the channels
    blocks: Blocks | None  # of what lies behind the samples; None: per_channel, or aligned by dims

    @classmethod
    def of(cls, setting: Setting, site: Site, model: nn.Module) -> Activation:
        kind, shape = type(model.get_submodule(setting.module)).__name__, site.shape
        said = setting.said_by("granularity")
        if len(shape) < 2:
            raise UserError(f"{setting.name}: it has {len(shape)} dimensions, but needs samples and one more to prune.")
        dim, blocks = activation_dim(kind, len(shape)), None
        if setting.granularity not in ("per_channel", "default"):
            blocks = Blocks.of(setting.granularity, shape[1:], kind, f"{setting.name}: {said} behind the samples")
        return cls(setting, site, dim, blocks)

    @property
    def num_units(self) -> int:
        return self.blocks.num if self.blocks else self.site.shape[self.dim]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the smallest mask: 1 where it does not depend on the index."""
        sizes = self.site.shape if self.blocks else [n if d == self.dim else 1 for d, n in enumerate(self.site.shape)]
        return (1, *sizes[1:])

    def member(self) -> Member:
        return Member(self.setting.path, self.dim, torch.arange(self.num_units)[:, None], "activation")

    def mask(self, kept: torch.Tensor) -> torch.Tensor:
        """bool [num_units] -> `shape`."""
        return (self.blocks.spread(kept) if self.blocks else kept).view(self.shape)

    def by_unit(self, activation: torch.Tensor) -> torch.Tensor:
        """[samples, positions of a unit, units]."""
        if self.blocks is None:
            return activation.movedim(self.dim, -1).reshape(len(activation), -1, self.num_units)
        if tuple(activation.shape[1:]) != self.blocks.shape:
            raise UserError(
                f"{self.setting.name}: {self.setting.said_by('granularity')} needs activations of the same size, "
                f"{list(self.blocks.shape)} behind the samples, but this one has {list(activation.shape[1:])}. Use "
                "per_channel."
            )
        samples = len(activation)
        blocks = Blocks((samples, *self.blocks.shape), (1, *self.blocks.sizes))
        return blocks.rows(activation).reshape(samples, self.num_units, -1).transpose(1, 2)


class Activations:
    """All activations with masks, by path (module.site). The masks are in the model from the start."""

    def __init__(self, settings: Sequence[Setting], model: nn.Module, sites: Sites | None) -> None:
        self.model = model
        self.targets: dict[str, Activation] = {}
        self.hooks: dict[str, RemovableHandle] = {}
        for setting in settings:
            if setting.activation:
                assert sites is not None
                target = Activation.of(setting, sites.site(setting.module, setting.target), model)
                self.targets[setting.path] = target

    def members(self) -> dict[str, Member]:
        """The units of those that are decided, by path."""
        return {path: target.member() for path, target in self.targets.items() if target.setting.align is None}

    def install(self) -> None:
        """Put masks that keep everything into the model."""
        device = device_of(self.model)
        self.put_on({path: torch.ones(t.shape, dtype=torch.bool, device=device) for path, t in self.targets.items()})

    def masks(self, sets: Sequence[UnitSet], removed: Sequence[torch.Tensor]) -> Masks:
        """{path: bool, True = keep} of those that are decided."""
        device = device_of(self.model)
        return {
            member.fqn: self.targets[member.fqn].mask(~gone).to(device)
            for unit_set, gone in zip(sets, removed, strict=True)
            for member in unit_set.activations
        }

    def put_on(self, masks: Mapping[str, torch.Tensor]) -> None:
        """From the next forward pass on these masks act, and no others."""
        for path in [path for path in self.hooks if path not in masks]:
            self._drop(path)
        for path, mask in masks.items():
            setting = self.targets[path].setting
            module = self.model.get_submodule(setting.module)
            if path not in self.hooks:
                how, options = setting.apply_method, setting.apply_options
                self.hooks[path] = install(self.model, setting.module, setting.target, how, options, mask, False)
            else:
                setattr(module, self._buffer(path), mask.to(getattr(module, self._buffer(path))))

    def settle(self, layout: Layout, masks: Mapping[str, torch.Tensor]) -> Masks:
        """The model was shrunk: take off what masks nothing any more, and what a module's own weights can do. Returns
        the masks of these weights, {parameter: bool}, with `masks`, theirs so far, in them."""
        left = {path: mask for path, mask in self.on().items() if not bool(mask.all())}
        folded: Masks = {}
        for path, mask in list(left.items()):
            own = fold(layout, self.targets[path].setting, mask)
            for name, kept in own.items():
                folded[name] = folded.get(name, masks.get(name, torch.ones_like(kept))) & kept
            if own:
                del left[path]
        self.put_on(left)
        return folded

    def on(self) -> Masks:
        """{path: bool} of the masks that act now; of a model that was shrunk, what is left of them."""
        return {path: getattr(self._module(path), self._buffer(path)).bool() for path in self.hooks}

    def buffers(self) -> list[str]:
        """Full names of the buffers that hold the masks."""
        return [f"{self.targets[path].setting.module}.{self._buffer(path)}" for path in self.hooks]

    def _drop(self, path: str) -> None:
        self.hooks.pop(path).remove()
        delattr(self._module(path), self._buffer(path))

    def _module(self, path: str) -> nn.Module:
        return self.model.get_submodule(self.targets[path].setting.module)

    def _buffer(self, path: str) -> str:
        return PREFIX + self.targets[path].setting.target.replace(".", "_")


def add_fingerprint(mark: Mark, masks: Mapping[str, torch.Tensor]) -> Mark:
    """`mark`, the fingerprint of the masks of parameters, with those of activations added to it. Local."""
    total = mark.whole
    for path, mask in masks.items():
        start = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=6).digest(), "big")
        total += int(splitmix64((~mask).flatten().nonzero().flatten() + start).sum())
    return Mark(total, mark.share)
