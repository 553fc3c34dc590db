"""Classes that modules of a shrunk model are exchanged for, where their own code cannot say what is left."""

from __future__ import annotations

from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup.modules.attention import SlimAttention
from dist_compress.speedup.modules.norm import ExactNorm, NarrowNorm
from dist_compress.speedup.plan import Swap

REPLACEMENTS = {"slim_attention": SlimAttention, "exact_norm": ExactNorm, "narrow_norm": NarrowNorm}


def exchange(module: nn.Module, swap: Swap) -> None:
    """Make `module` what `swap` says, in place: the same object with its parameters, hooks and flags."""
    replacement_of(swap).exchange(module, swap.settings)


def replacement_of(swap: Swap) -> type:
    """The class behind the name of a swap. Raises UserError when there is none."""
    if swap.name not in REPLACEMENTS:
        known = ", ".join(sorted(REPLACEMENTS))
        raise UserError(f"The speedup plan asks for a module {swap.name!r}; this dist_compress has {known}.")
    return REPLACEMENTS[swap.name]
