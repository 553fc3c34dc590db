"""Known constants in slices that are about to go: into the next bias where that is exact, else the slices stay.

A channel whose norm still has its shift is not zero but constant. What a contraction makes of the constants of its
removed inputs is computed by running it on them; if that is one number per output channel, it is a bias.
"""

from __future__ import annotations

import torch
from torch import nn

from dist_compress.speedup import sets
from dist_compress.speedup.facts import Facts
from dist_compress.speedup.keep import Keep
from dist_compress.speedup.origin import behind, layer_of, makers
from dist_compress.speedup.structure import Contraction, Structure

_TOLERANCE = 1e-6  # of the largest constant: what counts as one number per channel


def close_constants(
    s: Structure, facts: Facts, keep: Keep, model: nn.Module, fold: bool = True
) -> dict[str, torch.Tensor]:
    """Grow `keep` until every removed constant can be folded; {bias fqn: its new value, kept channels only}. `fold`:
    else none can, and those that have an effect stay."""
    made_by = makers(s.trace)
    uses: dict[int, int] = {}
    for c in s.contractions:
        weight, _ = behind(s.trace, made_by, c.b)
        if weight is not None:
            uses[weight.id] = uses.get(weight.id, 0) + 1
    while True:
        biases: dict[str, torch.Tensor] = {}
        grown = False
        for c in s.contractions:
            removed = ~keep.kept[c.contracted]
            constants = removed & _constants(c, facts) if bool(removed.any()) else removed
            if not bool(constants.any()):
                continue
            contribution = _contribution(c, s, facts, keep)
            if contribution is not None and not bool((contribution != 0).any()):
                continue
            weight, _ = behind(s.trace, made_by, c.b)
            bias = None
            if fold and contribution is not None and weight is not None and uses[weight.id] == 1:
                bias = _fold(c, s, contribution, model, s.trace.info(weight).all_fqns, keep)
            if bias is None:
                keep.grow(c.contracted, constants, f"holds a constant that {c.op.name} in {c.op.module} cannot fold")
                grown = True
            else:
                biases[bias[0]] = bias[1]
        if not grown:
            return biases
        keep.close()


def _constants(c: Contraction, facts: Facts) -> torch.Tensor:
    """Positions of the contracted dim that hold a constant other than zero: bool [n], or [1] for all alike."""
    found = facts.constants(c.a)
    others = [d for d in range(found.dim()) if d != c.contracted_dim % found.dim()]
    along = sets.any_over(found, others).flatten()
    value = facts.value(c.a) if bool(along.any()) else None
    if value is not None:  # a relu, say, has made zeros of some
        along = along & sets.any_over((value != 0).cpu(), others).flatten()
    return along


def _contribution(c: Contraction, s: Structure, facts: Facts, keep: Keep) -> torch.Tensor | None:
    """What the removed constants add to the kept outputs, float64; None when their values are not known."""
    a, b = facts.value(c.a), facts.value(c.b)
    if a is None or b is None or c.equation == "":
        return None
    removed = (~keep.kept[c.contracted]).nonzero().flatten().to(a.device)
    dim = c.contracted_dim
    only = torch.zeros_like(a, dtype=torch.float64)
    only.index_copy_(dim % a.dim(), removed, a.index_select(dim, removed).double())
    only = torch.where(facts.tainted(c.a).to(a.device), 0.0, only)  # tainted and removed: nothing sees it
    if c.op.name == "convolution":
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        settings = [c.op.arg(name) for name in names]
        total = torch.ops.aten.convolution(only, b.double(), None, *settings)
    elif c.equation is not None:
        total = torch.einsum(c.equation, only, b.double())
    else:
        total = only @ b.double()
    if total.dim() == 0:
        return total
    out_var = s.dims(c.op.out)[c.result_dim]
    kept = keep.kept[out_var].nonzero().flatten().to(a.device)
    return total.index_select(c.result_dim, kept)


def _fold(
    c: Contraction, s: Structure, contribution: torch.Tensor, model: nn.Module, fqns: tuple[str, ...], keep: Keep
) -> tuple[str, torch.Tensor] | None:
    """(bias fqn, new kept values), or None where one bias cannot hold the constants."""
    owner, name = layer_of(fqns[0])
    module = model.get_submodule(owner)
    padded = c.op.name == "convolution" and any(c.op.arg("padding"))
    scalar_or_batched = contribution.dim() == 0 or contribution.dim() == 3 and c.op.name == "bmm"
    if len(fqns) != 1 or name != "weight" or padded or scalar_or_batched:
        return None
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or not _same_bias(c, s, module, owner):
        return None
    rows = contribution.movedim(c.result_dim, -1).flatten(0, -2)
    spread = (rows - rows[0]).abs().max()
    if float(spread) > _TOLERANCE * float(rows.abs().max()):
        return None
    kept = keep.kept[s.dims(c.op.out)[c.result_dim]].nonzero().flatten().to(rows.device)
    bias = rows[0]
    if module.bias is not None:
        bias = bias + module.bias.detach().index_select(0, kept).double()
    return f"{owner}.bias".lstrip("."), bias.to(module.weight.dtype).cpu()


def _same_bias(c: Contraction, s: Structure, module: nn.Module, owner: str) -> bool:
    """Whether the op adds exactly the module's own bias."""
    inputs = [s.trace.info(ref) for ref in c.op.inputs]
    biases = [i for i in inputs if i.kind == "param" and len(i.shape) == 1]
    if module.bias is None:
        return c.op.name in ("mm", "convolution") and len(inputs) == 2
    return len(biases) == 1 and biases[0].all_fqns == (f"{owner}.bias".lstrip("."),)
