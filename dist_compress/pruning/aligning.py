"""`align`: masks that follow other masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from dist_compress.blocks import Blocks, channel_dim
from dist_compress.errors import UserError
from dist_compress.pruning.mask import owners
from dist_compress.pruning.setting import Setting


def check_aligned(model: nn.Module, settings: Sequence[Setting], masked: Iterable[str]) -> None:
    """Raise UserError unless every `align` names a masked parameter of fitting sizes and no two follow each other.
    Local."""
    names, known = owners(model), set(masked)
    for setting in settings:
        if setting.align is not None:
            known.add(names[setting.parameter])
    for setting in settings:
        if setting.align is None:
            continue
        source, said = _source(setting), f"{setting.name}: {setting.said_by('align')}"
        if names.get(source) not in known:
            listed = ", ".join(list(masked)[:20]) or "none"
            raise UserError(f"{said}: {source} is not masked by pruning. Masked: {listed}.")
        shape, own = model.get_parameter(source).shape, model.get_parameter(setting.parameter).shape
        dims = setting.align.dims
        if not all(-len(shape) <= dim < len(shape) for dim in dims):
            raise UserError(f"{said}: {source} has {len(shape)} dimensions.")
        if len({dim % len(shape) for dim in dims}) < len(dims):
            raise UserError(f"{said}: dims names a dimension twice.")
        places = _places(setting, model)
        if len(places) > len(own) or places[-1] >= len(own):
            raise UserError(f"{said}: {setting.parameter} has {len(own)} dimensions, too few for dims={dims}.")
        for dim, place in zip(dims, places, strict=True):
            if shape[dim] != own[place]:
                raise UserError(f"{said}: dimension {dim} of {source} is {shape[dim]}, not {own[place]}.")
        _blocks(setting, model)
    _in_order(settings, model)


def align(model: nn.Module, settings: Sequence[Setting], masks: dict[str, torch.Tensor]) -> None:
    """Add the masks of the aligned parameters: alive where the source has anything alive at the same place of `dims`;
    of a block, where any of its weights would be."""
    names = owners(model)
    for setting in _in_order(settings, model):
        assert setting.align is not None
        source = _source(setting)
        shape, own = model.get_parameter(source).shape, model.get_parameter(setting.parameter).shape
        dims = [dim % len(shape) for dim in setting.align.dims]
        full = masks[names[source]].expand(shape)
        rest = [d for d in range(len(shape)) if d not in dims]
        alive = full.permute(*dims, *rest).reshape(*(shape[d] for d in dims), -1).any(-1)
        view = [1] * len(own)
        for dim, place in zip(dims, _places(setting, model), strict=True):
            view[place] = shape[dim]
        mask = alive.view(view)
        blocks = _blocks(setting, model)
        if blocks is not None:
            mask = blocks.spread(blocks.rows(mask.expand(own)).any(1))
        key = names[setting.parameter]
        masks[key] = masks[key] & mask if key in masks else mask


def _source(setting: Setting) -> str:
    assert setting.align is not None
    return f"{setting.align.module_name or setting.module}.{setting.align.target_name}"


def _places(setting: Setting, model: nn.Module) -> list[int]:
    """The dims of the target that those of the source stand for: the channels, or the leading ones."""
    assert setting.align is not None
    if len(setting.align.dims) > 1:
        return list(range(len(setting.align.dims)))
    kind = type(model.get_submodule(setting.module)).__name__
    granularity = "in_channel" if setting.granularity == "in_channel" else "out_channel"
    return [channel_dim(kind, model.get_parameter(setting.parameter).dim(), granularity)]


def _blocks(setting: Setting, model: nn.Module) -> Blocks | None:
    if not isinstance(setting.granularity, list):
        return None
    kind = type(model.get_submodule(setting.module)).__name__
    shape = model.get_parameter(setting.parameter).shape
    return Blocks.of(setting.granularity, shape, kind, f"{setting.name}: {setting.said_by('granularity')}")


def _in_order(settings: Sequence[Setting], model: nn.Module) -> list[Setting]:
    """Aligned targets, each behind the one that it follows. Raises UserError for a circle."""
    names = owners(model)
    waiting: Mapping[str, Setting] = {names[s.parameter]: s for s in settings if s.align}
    ordered: list[Setting] = []
    while waiting:
        ready = [s for s in waiting.values() if names[_source(s)] not in waiting]
        if not ready:
            said = " and ".join(list(dict.fromkeys(s.said_by("align") for s in waiting.values()))[:2])
            raise UserError(f"{', '.join(s.name for s in waiting.values())} follow each other: {said}.")
        ordered += ready
        waiting = {name: s for name, s in waiting.items() if s not in ready}
    return ordered
