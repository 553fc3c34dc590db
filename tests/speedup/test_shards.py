"""Shards of a tensor, shrunk one by one, make up the shrunk tensor."""

import pytest
import torch

from dist_compress.errors import UserError
from dist_compress.speedup import Plan, apply_to_shard, apply_to_state

KEPT = {"fc.weight": {0: torch.tensor([0, 3, 4, 6]), 1: torch.tensor([1, 2])}, "in.weight": {1: torch.tensor([0])}}
PLAN = Plan(KEPT, shapes={"fc.weight": (7, 3), "in.weight": (4, 2)})


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1, 2, 4], [0, 7]])
def test_shards_make_up_the_whole(sizes):
    whole = torch.randn(7, 3)
    shards, start = [], 0
    for shard in whole.split(sizes):
        small, begin = apply_to_shard(PLAN, "fc.weight", shard, start)
        assert begin == sum(map(len, shards))
        shards.append(small)
        start += len(shard)
    assert torch.equal(torch.cat(shards), apply_to_state(PLAN, {"fc.weight": whole})["fc.weight"])


def test_rows_stay_where_only_columns_go():
    small, begin = apply_to_shard(PLAN, "in.weight", torch.randn(2, 2), 2)
    assert small.shape == (2, 1) and begin == 2
    other = torch.randn(5)
    assert apply_to_shard(PLAN, "other", other, 1)[0] is other


@pytest.mark.parametrize("shape, start", [((3, 3), 5), ((2, 2), 0), ((2, 3), -1)])
def test_rows_that_the_tensor_has_not_are_refused(shape, start):
    with pytest.raises(UserError, match="are not a part of 'fc.weight'"):
        apply_to_shard(PLAN, "fc.weight", torch.randn(shape), start)
