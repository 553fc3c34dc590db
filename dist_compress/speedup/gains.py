"""Gains of normalised weights: a cut weight is what it was if the gain makes up for what its norm lost."""

from __future__ import annotations

import torch
from torch import nn

from dist_compress.speedup.keep import Keep
from dist_compress.speedup.structure import Structure
from dist_compress.speedup.weight_norm import NAMES


def close_gains(s: Structure, keep: Keep, model: nn.Module) -> dict[str, torch.Tensor]:
    """{gain fqn: its kept values} such that cut weights are what they were; grows `keep` where none makes them so."""
    ops = [op for op in s.trace.tape if op.name in NAMES and op.inputs[0].id in s.known()]
    while True:
        gains: dict[str, torch.Tensor] = {}
        grown = False
        for op in ops:
            v, g = (model.get_parameter(s.trace.info(ref).fqn).detach() for ref in op.inputs)
            others = [d for d, var in enumerate(s.dims(op.inputs[0])) if d != op.arg("dim")]
            cut = [d for d in others if not bool(keep.kept[s.dims(op.inputs[0])[d]].all())]
            if not cut:
                continue
            kept = [keep.kept[var] for var in s.dims(op.inputs[0])]
            new = None if v.is_meta else _gain(v, g, op.arg("dim"), kept)
            if new is None:
                for d in cut:
                    var = s.dims(op.inputs[0])[d]
                    keep.grow(var, torch.ones_like(keep.kept[var]), "is normalised with what is left of it")
                grown = True
            else:
                gains |= {fqn: new.to(g.dtype).cpu() for fqn in s.trace.info(op.inputs[1]).all_fqns}
        if not grown:
            return gains
        keep.close()


def _gain(v: torch.Tensor, g: torch.Tensor, dim: int, kept: list[torch.Tensor]) -> torch.Tensor | None:
    """g * |what is kept of v| / |v|; None where nothing is left of a direction that counts."""
    others = [d for d in range(v.dim()) if d != dim]
    rows = kept[dim].nonzero().flatten().to(v.device)
    v, g = v.double().index_select(dim, rows), g.double().index_select(dim, rows)
    left = v
    for d in others:
        left = left.index_select(d, kept[d].nonzero().flatten().to(v.device))
    before, after = (x.square().sum(others, keepdim=True).sqrt() for x in (v, left))
    if bool(((after == 0) & (g != 0)).any()):
        return None
    return torch.where(g == 0, 0.0, g * after / before)
