"""How a parameter is cut: by hand, back and forth, and what cannot be cut."""

import math

import pytest
import torch

from dist_compress.blocks import Blocks, channel_dim, parse
from dist_compress.errors import UserError

FOUR_BY_FOUR = torch.arange(16).view(4, 4)


@pytest.mark.parametrize(
    ("granularity", "shape", "sizes"),
    [
        ("element", (2, 3), (1, 1)),
        ([2, 2], (4, 4), (2, 2)),
        ([1, -1], (4, 6), (1, 6)),
        ([-1], (4, 6), (1, 6)),
        ([4], (8, 2, 3, 4), (1, 1, 1, 4)),
        ([[2], "front", -1], (8, 2, 3, 4), (8, 2, 3, 2)),
        ([[2], "back", -1], (8, 2, 3, 4), (2, 2, 3, 4)),
        ([[2], "back", 1], (8, 2), (2, 1)),
        ([-1, -1], (4, 6), (4, 6)),
        ([3], (6,), (3,)),
    ],
)
def test_sizes(granularity, shape, sizes):
    blocks = Blocks.of(parse(granularity, "granularity"), shape, "Linear", "it")
    assert blocks.sizes == sizes
    assert blocks.num * blocks.size == torch.Size(shape).numel()
    flat = torch.arange(blocks.num)
    assert torch.equal(blocks.rows(blocks.spread(flat)), flat[:, None].expand(blocks.num, blocks.size))


def test_rows_are_the_blocks():
    blocks = Blocks.of([2, 2], (4, 4), "Linear", "it")
    assert blocks.rows(FOUR_BY_FOUR).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert blocks.spread(torch.arange(4))[0].tolist() == [0, 0, 1, 1]
    elements = Blocks.of("element", (4, 4), "Linear", "it")
    assert elements.rows(FOUR_BY_FOUR).data_ptr() == FOUR_BY_FOUR.data_ptr()  # no copy


def test_a_pattern_goes_along_the_input_dim():
    blocks = Blocks.of("2:4", (3, 4, 2, 2), "Conv2d", "it")
    weight = torch.arange(48).view(3, 4, 2, 2)
    assert blocks.rows(weight).view(-1, 4)[1].tolist() == weight[0, :, 0, 1].tolist() and blocks.group == 4
    assert torch.equal(blocks.spread(blocks.rows(weight).flatten()), weight)
    swapped = Blocks.of("1:2", (4, 6), "Embedding", "it")  # its input is dim 0
    weight = torch.arange(24).view(4, 6)
    assert swapped.rows(weight).view(-1, 2)[0].tolist() == [0, 6]
    assert torch.equal(swapped.spread(swapped.rows(weight).flatten()), weight)


@pytest.mark.parametrize(
    ("granularity", "shape", "said"),
    [
        ([3, 4], (8, 8), "a: dimension 0 has size 8, which is no multiple of 3"),
        ([1, 4, 4], (8, 8), "a has 3 sizes, but the parameter has 2 dimensions"),
        ("2:4", (8, 6), "a: dimension 1 has size 6, which is no multiple of 4"),
        ("2:4", (8,), "a goes along the input dim, which a parameter of one dimension does not have"),
    ],
)
def test_what_cannot_be_cut(granularity, shape, said):
    with pytest.raises(UserError, match=said):
        Blocks.of(granularity, shape, "Linear", "a")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("4:2", "N must be below M"),
        ("4:4", "N must be below M"),
        ("0:4", "allowed are default, out_channel"),
        (124, "Quote it in YAML"),
        ([0, 4], "allowed are"),
        ([True], "allowed are"),
        ([], "allowed are"),
        ([[4], "side", 1], "allowed are"),
        ([[4], "back", 0], "allowed are"),
        ([[4], "back"], "allowed are"),
        (None, "allowed are"),
    ],
)
def test_what_is_no_granularity(value, said):
    with pytest.raises(UserError, match="x.granularity=.*" + said):
        parse(value, "x.granularity")


def test_channel_dims():
    assert [channel_dim(kind, 2, "out_channel") for kind in ("Linear", "Embedding", "ConvTranspose2d")] == [0, 1, 1]
    assert [channel_dim(kind, 2, "in_channel") for kind in ("Linear", "Embedding", "Conv1D")] == [1, 0, 0]
    assert channel_dim("ConvTranspose2d", 1, "out_channel") == 0  # its bias


@pytest.mark.parametrize(
    ("granularity", "shape", "kind", "slab"),
    [
        ("element", (3, 4), "Linear", 1),
        ("element", (), "Linear", 1),
        ([2, 2], (4, 6), "Linear", 12),  # two rows
        ([1, -1], (4, 6), "Linear", 6),
        ([-1, 1], (4, 6), "Linear", 24),  # columns: nothing smaller is contiguous
        ([1, 1, -1, -1], (4, 3, 2, 2), "Conv2d", 4),
        ([1, 3, 1, 1], (4, 6, 2, 2), "Conv2d", 12),
        ("1:2", (4, 6), "Linear", 2),
        ("2:4", (4, 8, 2, 3), "Conv2d", 48),
        ("1:2", (4, 6), "Embedding", 24),  # along dim 0
    ],
)
def test_slabs_are_contiguous_and_decided_on_their_own(granularity, shape, kind, slab):
    blocks = Blocks.of(granularity, shape, kind, "it")
    weight = torch.arange(math.prod(shape)).view(shape)
    assert blocks.slab == slab
    rows = blocks.rows(weight)
    per, num = slab // blocks.size, weight.numel() // slab
    for first, count in {(0, num), (num // 2, num - num // 2), (num - 1, 1)}:
        part = blocks.slabs(count)
        flat = weight.flatten()[first * slab : (first + count) * slab]
        assert torch.equal(part.rows(flat.view(part.shape)), rows[first * per : (first + count) * per])
        values = torch.arange(count * per)
        full = torch.zeros(blocks.num, dtype=torch.int64)
        full[first * per : (first + count) * per] = values
        spread = blocks.spread(full).flatten()[first * slab : (first + count) * slab]
        assert torch.equal(part.spread(values).flatten(), spread) and part.slab == slab
