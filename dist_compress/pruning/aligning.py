"""`align`: masks that follow other masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from dist_compress import comm
from dist_compress.blocks import Blocks, channel_dim
from dist_compress.errors import UserError
from dist_compress.layout import Layout, device_of
from dist_compress.projection import Projection
from dist_compress.pruning.activations import Activation
from dist_compress.pruning.mask import owners
from dist_compress.pruning.setting import Setting


class Tensors:
    """All that may have a mask, by name: parameters, as this rank holds them, and activations, which are whole."""

    def __init__(self, projection: Projection, activations: Mapping[str, Activation]) -> None:
        self.projection, self.activations, self.model = projection, activations, projection.model

    @property
    def layout(self) -> Layout:
        """That of now: the model may have been sharded since."""
        return self.projection.layout

    def owners(self) -> dict[str, str]:
        return owners(self.model) | {path: path for path in self.activations}

    def shape(self, name: str) -> torch.Size:
        found = self.activations.get(name)
        return torch.Size(found.site.shape) if found else self.layout.shape(name)

    def is_whole(self, name: str) -> bool:
        return name in self.activations or self.layout.is_whole(name)

    def part(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        """Of a whole mask what this rank holds."""
        if name in self.activations:
            return mask.to(device_of(self.model))
        return self.layout.part(name, mask).to(self.layout.device(name))


def check_aligned(tensors: Tensors, settings: Sequence[Setting], masked: Iterable[str]) -> None:
    """Raise UserError unless every `align` names a masked target of fitting sizes and no two follow each other.
    Local."""
    names, known = tensors.owners(), set(masked)
    for setting in settings:
        if setting.align is not None:
            known.add(names[setting.path])
    for setting in settings:
        if setting.align is None:
            continue
        source, said = _source(setting), f"{setting.name}: {setting.said_by('align')}"
        if names.get(source) not in known:
            listed = ", ".join(list(masked)[:20]) or "none"
            raise UserError(f"{said}: {source} is not masked by pruning. Masked: {listed}.")
        shape, own = tensors.shape(source), tensors.shape(setting.path)
        dims = setting.align.dims
        if not all(-len(shape) <= dim < len(shape) for dim in dims):
            raise UserError(f"{said}: {source} has {len(shape)} dimensions.")
        if len({dim % len(shape) for dim in dims}) < len(dims):
            raise UserError(f"{said}: dims names a dimension twice.")
        if source in tensors.activations and any(dim % len(shape) == 0 for dim in dims):
            raise UserError(f"{said}: dimension 0 of {source} holds the samples.")
        places = _places(setting, tensors)
        if len(places) > len(own) or places[-1] >= len(own):
            raise UserError(f"{said}: {setting.path} has {len(own)} dimensions, too few for dims={dims}.")
        for dim, place in zip(dims, places, strict=True):
            if shape[dim] != own[place]:
                raise UserError(f"{said}: dimension {dim} of {source} is {shape[dim]}, not {own[place]}.")
        _blocks(setting, tensors)
    _in_order(settings, tensors)


def align(tensors: Tensors, settings: Sequence[Setting], masks: dict[str, torch.Tensor]) -> None:
    """Add the masks of the aligned targets: alive where the source has anything alive at the same place of `dims`;
    of a block, where any of its weights would be. Collective if a source is sharded: once for all that follow none."""
    names = tensors.owners()
    for ready in _in_order(settings, tensors):
        alive = [_alive(tensors, setting, names[_source(setting)], masks) for setting in ready]
        sharded = [i for i, setting in enumerate(ready) if not tensors.is_whole(names[_source(setting)])]
        if sharded:
            flat = torch.cat([alive[i].flatten() for i in sharded]).to(comm.device(), torch.uint8)
            found = comm.all_reduce(flat, "max").bool().split([alive[i].numel() for i in sharded])
            for i, vector in zip(sharded, found, strict=True):
                alive[i] = vector.view(alive[i].shape)
        for setting, places in zip(ready, alive, strict=True):
            own = tensors.shape(setting.path)
            view = [1] * len(own)
            for size, place in zip(places.shape, _places(setting, tensors), strict=True):
                view[place] = size
            mask, blocks = places.view(view), _blocks(setting, tensors)
            if blocks is not None and setting.activation:  # blocks of what lies behind the samples
                mask = blocks.spread(blocks.rows(mask[0].expand(own[1:])).any(1))[None]
            elif blocks is not None:
                mask = blocks.spread(blocks.rows(mask.expand(own)).any(1))
            key = names[setting.path]
            mask = tensors.part(key, mask)
            masks[key] = masks[key] & mask if key in masks else mask


def _alive(tensors: Tensors, setting: Setting, source: str, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Where this rank sees anything alive: bool, of the sizes of the source in the dims the target follows. Local."""
    assert setting.align is not None
    shape, layout = tensors.shape(source), tensors.layout
    dims = [dim % len(shape) for dim in setting.align.dims]
    if tensors.is_whole(source):
        rest = [d for d in range(len(shape)) if d not in dims]
        return masks[source].expand(shape).permute(*dims, *rest).reshape(*(shape[d] for d in dims), -1).any(-1)
    kept = masks[source].expand(layout.local(source).shape).flatten()
    runs = [
        torch.arange(first, first + length, device=kept.device) for first, length in layout.runs(source, comm.rank())
    ]
    index = torch.cat([torch.zeros(0, dtype=torch.int64, device=kept.device), *runs])[kept]
    places = torch.zeros_like(index)
    for dim in dims:
        places = places * shape[dim] + index // math.prod(shape[dim + 1 :]) % shape[dim]
    alive = torch.zeros(math.prod(shape[d] for d in dims), dtype=torch.bool, device=kept.device)
    alive[places] = True
    return alive.view([shape[d] for d in dims])


def _source(setting: Setting) -> str:
    assert setting.align is not None
    return f"{setting.align.module_name or setting.module}.{setting.align.target_name}"


def _places(setting: Setting, tensors: Tensors) -> list[int]:
    """The dims of the target that those of the source stand for: the channels, or the leading ones, which begin behind
    the samples of an activation."""
    assert setting.align is not None
    if len(setting.align.dims) > 1:
        first = int(setting.activation)
        return list(range(first, first + len(setting.align.dims)))
    if setting.activation:
        return [tensors.activations[setting.path].dim]
    kind = type(tensors.model.get_submodule(setting.module)).__name__
    granularity = "in_channel" if setting.granularity == "in_channel" else "out_channel"
    return [channel_dim(kind, len(tensors.shape(setting.path)), granularity)]


def _blocks(setting: Setting, tensors: Tensors) -> Blocks | None:
    if setting.activation:
        return tensors.activations[setting.path].blocks
    if not isinstance(setting.granularity, list):
        return None
    kind = type(tensors.model.get_submodule(setting.module)).__name__
    shape = tensors.shape(setting.path)
    return Blocks.of(setting.granularity, shape, kind, f"{setting.name}: {setting.said_by('granularity')}")


def _in_order(settings: Sequence[Setting], tensors: Tensors) -> list[list[Setting]]:
    """Aligned targets, each in a list behind that of the one that it follows. Raises UserError for a circle."""
    names = tensors.owners()
    waiting: Mapping[str, Setting] = {names[s.path]: s for s in settings if s.align}
    ordered: list[list[Setting]] = []
    while waiting:
        ready = [s for s in waiting.values() if names[_source(s)] not in waiting]
        if not ready:
            said = " and ".join(list(dict.fromkeys(s.said_by("align") for s in waiting.values()))[:2])
            raise UserError(f"{', '.join(s.name for s in waiting.values())} follow each other: {said}.")
        ordered.append(ready)
        waiting = {name: s for name, s in waiting.items() if s not in ready}
    return ordered
