"""Granularity: the examples of its docstring, and that rows and spread are each other's inverse."""

from __future__ import annotations

import pytest
import torch

from dist_compress.errors import UserError
from dist_compress.quantization.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    rows,
    spread,
)

CASES = [
    (PerTensor(), [8, 16, 3, 3], [1]),
    (PerChannel(dim=0), [8, 16, 3, 3], [8, 1, 1, 1]),
    (PerChannel(dim=1), [32, 16, 7, 7], [1, 16, 1, 1]),
    (PerChannel(dim=-1), [32, 16], [1, 16]),
    (PerGroup(size=4), [8, 16], [8, 4]),
    (PerToken(), [2, 5, 16], [2, 5, 1]),
    (PerBlock((4, 4)), [8, 16], [2, 4]),
    (PerBlock((4, 4)), [3, 8, 16], [3, 2, 4]),
    (PerBlock((1, -1)), [8, 16], [8, 1]),
]


@pytest.mark.parametrize(("granularity", "shape", "scale_shape"), CASES)
def test_scale_shapes(granularity: Granularity, shape, scale_shape):
    assert list(granularity.scale_shape(shape)) == scale_shape
    x = torch.randn(shape)
    top = rows(x, granularity).amax(1).view(scale_shape)
    spread_out = spread(top, shape, granularity).expand(shape)
    assert bool((x <= spread_out).all())
    assert int((x == spread_out).sum()) == top.numel()  # each block's largest value is in that block


def test_a_size_must_divide():
    with pytest.raises(UserError, match="weight: dimension 1 has size 10, which is no multiple of 4"):
        PerGroup(4).check([8, 10], "weight")
    PerGroup(5).check([8, 10], "weight")
