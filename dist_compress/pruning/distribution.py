"""How a ratio is shared out among targets that are decided one by one.

`erk`, Erdos-Renyi-Kernel (Evci et al. 2020, arXiv:1911.11134, after Mocanu et al. 2018): the density of a target is in
proportion to the sum of its sizes over their product, (in + out + width + height) / (in * out * width * height) for a
convolution, as far as its bounds allow. Small layers stay denser than large ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import nn

from dist_compress.blocks import Blocks
from dist_compress.errors import UserError
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.setting import Setting
from dist_compress.pruning.sparsity import count_bounds, share


def distribute(settings: Sequence[Setting], scorers: Mapping[str, Metric], model: nn.Module) -> None:
    """Replace the ratio of all targets whose method asks for another distribution than the uniform one. Targets share
    if method, options and ratio are the same. Local, the same on every rank. Raises UserError."""
    pools: dict[tuple[int, float | Fraction], list[Setting]] = {}
    for setting in settings:
        if setting.align is None and scorers[setting.name].distribution == "erk":
            pools.setdefault((id(scorers[setting.name]), setting.sparse_ratio), []).append(setting)
    for (_, ratio), members in pools.items():
        shapes = [model.get_parameter(s.parameter).shape for s in members]
        kinds = [type(model.get_submodule(s.module)).__name__ for s in members]
        nums = [
            Blocks.of(s.granularity, shape, kind, s.name).num
            for s, shape, kind in zip(members, shapes, kinds, strict=True)
        ]
        wanted = sum(nums) - math.floor(share(ratio) * sum(nums))
        weights = [Fraction(sum(shape) * num, shape.numel()) for shape, num in zip(shapes, nums, strict=True)]
        bounds = [count_bounds(num, s, 1.0) for num, s in zip(nums, members, strict=True)]
        least, most = ([num - b[k] for num, b in zip(nums, bounds, strict=True)] for k in (1, 0))
        if not sum(least) <= wanted <= sum(most):
            raise UserError(
                f"{members[0].said_by('sparse_ratio')} keeps {wanted} of {sum(nums)}, but min_sparse_ratio and "
                f"max_sparse_ratio of its targets allow {sum(least)} to {sum(most)}. Change one of them."
            )
        for setting, num, kept in zip(members, nums, in_proportion(weights, least, most, wanted), strict=True):
            setting.sparse_ratio = Fraction(num - kept, num)


def in_proportion(weights: Sequence[Fraction], least: Sequence[int], most: Sequence[int], total: int) -> list[int]:
    """Counts in proportion to the positive `weights`, as far as the bounds allow, that add up to `total`, which the
    bounds allow. Rounded by the largest remainder, earlier ones first."""

    def at(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * w, Fraction(a)), Fraction(b)) for w, a, b in zip(weights, least, most, strict=True)]

    turns = sorted(
        {Fraction(0), *(b / w for w, bound in zip(weights, zip(least, most, strict=True), strict=True) for b in bound)}
    )
    low, high = 0, len(turns) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(at(turns[middle])) <= total else (low, middle)
    below, above = at(turns[low]), at(turns[high])
    step = sum(above) - sum(below)  # linear between two turns
    part = (total - sum(below)) / step if step else Fraction(0)
    exact = [b + (a - b) * part for a, b in zip(above, below, strict=True)]
    counts = [math.floor(x) for x in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts
