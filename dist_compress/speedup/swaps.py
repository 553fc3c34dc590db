"""Which modules of a shrunk model are exchanged, because their own code cannot say what is left of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TypeGuard

import torch
from torch import nn

from dist_compress.speedup.modules.attention import attention_settings
from dist_compress.speedup.norms import formula_of
from dist_compress.speedup.plan import Swap
from dist_compress.tracing.walk import modules_of

Kept = Mapping[str, Mapping[int, torch.Tensor]]


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether `module` can be exchanged for one that knows its head size; a subclass has code of its own."""
    return type(module) is nn.MultiheadAttention


def swaps(model: nn.Module, kept: Kept, normalised: Mapping[str, int]) -> dict[str, Swap]:
    """{module fqn: what it becomes} for a model that keeps `kept` of its tensors ({fqn: {dim: indices}}).

    normalised {fqn of a norm: kept positions of the dim that it normalises}, as far as they are fewer.
    """
    found = {name: _norm(model.get_submodule(name), left) for name, left in normalised.items()}
    owners = {fqn.rpartition(".")[0] for fqn in kept} | {fqn.rpartition(".")[0].rpartition(".")[0] for fqn in kept}
    for name, module in modules_of(model).items():
        if name in owners and is_attention(module):
            found[name] = Swap("slim_attention", _attention(name, module, kept))
    return found


def nested_encoders(model: nn.Module, found: Mapping[str, Swap]) -> dict[str, int]:
    """{"encoder.use_nested_tensor": False}: nested tensors are only for the fused layers of torch."""
    return {
        f"{name}.use_nested_tensor".lstrip("."): False
        for name, module in modules_of(model).items()
        if isinstance(module, nn.TransformerEncoder)
        and getattr(module, "use_nested_tensor", False)
        and any(swap.startswith(f"{name}.".lstrip(".")) for swap in found)
    }


def narrow(found: Mapping[str, Swap]) -> dict[str, Swap]:
    """The same, with norms that divide by their new width instead of the old one."""
    return {
        name: Swap("narrow_norm", {"kept": swap.settings["kept"]}) if swap.name == "exact_norm" else swap
        for name, swap in found.items()
    }


def _norm(module: nn.Module, left: int) -> Swap:
    formula = formula_of(module)
    assert formula is not None, "only norms are leaves that shrink"
    return Swap("exact_norm", {"kept": left, **asdict(formula)})


def _attention(name: str, module: nn.MultiheadAttention, kept: Kept) -> dict[str, int | float | bool]:
    def left(parameter: str, dim: int, size: int) -> torch.Tensor:
        return kept.get(f"{name}.{parameter}".lstrip("."), {}).get(dim, torch.arange(size))

    width = module.embed_dim
    if module.in_proj_weight is not None:
        rows = left("in_proj_weight", 0, 3 * width)
        embed = key = value = left("in_proj_weight", 1, width)
    else:
        parts = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        rows = torch.cat([left(part, 0, width) + i * width for i, part in enumerate(parts)])
        embed, key, value = (left(part, 1, n) for part, n in zip(parts, (width, module.kdim, module.vdim), strict=True))
    heads = left("out_proj.weight", 1, width)
    return attention_settings(module, {"rows": rows, "heads": heads, "embed": embed, "key": key, "value": value})
