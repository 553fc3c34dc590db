"""Radix select against a stable sort, on 1 to 4 ranks: the cases a threshold or a gather gets wrong."""

import numpy as np
import pytest
import torch

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.hashing import splitmix64
from dist_compress.pruning.radix import score_key, tie_key
from dist_compress.pruning.select import Group, Shard, select

SIZES = (1200, 1, 799, 0, 500)  # elements of each module
NUM = sum(SIZES)
MODULES = [f"layer{m}" for m in range(len(SIZES))]
BASES = [sum(SIZES[:m]) for m in range(len(SIZES))]

SCORES = {
    "normal": lambda g: torch.randn(NUM, generator=g),
    "abs": lambda g: torch.randn(NUM, generator=g).abs(),
    "all_equal": lambda g: torch.full((NUM,), 0.25),
    "few": lambda g: torch.randint(0, 4, (NUM,), generator=g).float(),
    "zeros": lambda g: torch.tensor([0.0, -0.0]).repeat(NUM // 2),
    "denormal": lambda g: torch.randn(NUM, generator=g) * 1e-40,
    "removed": lambda g: torch.where(torch.rand(NUM, generator=g) < 0.3, -torch.inf, torch.randn(NUM, generator=g)),
    "bf16": lambda g: (torch.randn(NUM, generator=g) * 0.02).bfloat16().float().abs(),
}


def scores_of(kind: str) -> torch.Tensor:
    return SCORES[kind](torch.Generator().manual_seed(len(kind)))


def shards_of(scores: torch.Tensor, rank: int, size: int, cost=1, pieces: int = 3) -> list[Shard]:
    """Runs of the modules dealt to the ranks unevenly: some ranks have none of a module, others several."""
    shards = []
    for m, module in enumerate(MODULES):
        for p in range(pieces):
            if (m + p * p) % size == rank:
                start, end = BASES[m] + SIZES[m] * p // pieces, BASES[m] + SIZES[m] * (p + 1) // pieces
                part = cost if isinstance(cost, int) else cost[m][p]
                shards.append(Shard(module, start, scores[start:end], part))
    return shards[::-1]


def whole(shards: list[Shard], removed: list[torch.Tensor]) -> torch.Tensor:
    """int64 [NUM] with this rank's decisions, summed over the ranks: 0 kept, 1 removed, 2 counted twice."""
    out = torch.zeros(NUM, dtype=torch.int64)
    for shard, mask in zip(shards, removed, strict=True):
        out[shard.base : shard.base + len(mask)] += mask
    return comm.all_reduce(out)


def oracle(scores: torch.Tensor, target: int, cost: torch.Tensor | None = None) -> torch.Tensor:
    """Stable sort in numpy, written from the definition of the order."""
    index = np.arange(NUM)
    tie = (splitmix64(torch.arange(NUM)) & 0x7FFF).numpy()
    order = np.lexsort((index, tie, (scores + 0.0).numpy()))
    cost_sorted = np.ones(NUM, int) if cost is None else cost.numpy()[order]
    pruned = int(np.isneginf(scores.numpy()).sum()) if cost is None else 0
    sums = np.concatenate([[0], np.cumsum(cost_sorted)])
    length = int(np.searchsorted(sums, max(target, pruned)))
    out = torch.zeros(NUM, dtype=torch.int64)
    out[torch.from_numpy(order[:length].copy())] = 1
    return out


def select_all(kind: str, targets: list[int], digits: tuple[int, ...]) -> list[torch.Tensor]:
    scores, out = scores_of(kind), []
    for target in targets:
        shards = shards_of(scores, comm.rank(), comm.world_size())
        out.append(whole(shards, select([Group("g", target, MODULES, shards)], digits)[0]))
    return out


TARGETS = [0, 1, 777, NUM // 2, NUM - 1, NUM]


@pytest.mark.parametrize("kind", list(SCORES))
def test_equals_a_stable_sort_on_any_number_of_ranks(ranks, kind):
    expected = [oracle(scores_of(kind), target) for target in TARGETS]
    for size in (1, 2, 3, 4):
        for result in ranks(size, select_all, kind, TARGETS, (11, 11, 10)):
            for got, want in zip(result, expected, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("digits", [(16, 16), (8, 8, 8, 8), (11, 11, 10)])
def test_digits_do_not_matter(digits):
    for kind in SCORES:
        assert torch.equal(select_all(kind, [777], digits)[0], oracle(scores_of(kind), 777))


def two_groups() -> tuple[list[torch.Tensor], dict]:
    shards = [shards_of(scores_of(kind), comm.rank(), comm.world_size()) for kind in ("normal", "abs")]
    comm.calls.clear()
    removed = select([Group("a", 700, MODULES, shards[0]), Group("b", 2000, MODULES, shards[1])])
    calls = dict(comm.calls)
    return [whole(s, r) for s, r in zip(shards, removed, strict=True)], calls


def test_groups_share_their_collectives(ranks):
    for (a, b), calls in ranks(3, two_groups):
        assert torch.equal(a, oracle(scores_of("normal"), 700))
        assert torch.equal(b, oracle(scores_of("abs"), 2000))
        assert set(calls) == {"all_reduce"} and calls["all_reduce"] <= 3  # at most three digits


COSTS = [[1 + (37 * m + 61 * p) % 100 for p in range(3)] for m in range(len(SIZES))]  # of each third of a module


def weighted(target: int) -> torch.Tensor:
    shards = shards_of(scores_of("few"), comm.rank(), comm.world_size(), COSTS)
    return whole(shards, select([Group("g", target, MODULES, shards)])[0])


def test_costs_give_the_shortest_prefix_that_reaches_the_target(ranks):
    cost = torch.zeros(NUM, dtype=torch.int64)
    for shard in shards_of(torch.zeros(NUM), 0, 1, COSTS):
        cost[shard.base : shard.base + len(shard.scores)] = shard.cost
    assert len(cost.unique()) > 5
    for target in (1, 5003, int(cost.sum()) - 1, int(cost.sum())):
        want = oracle(scores_of("few"), target, cost)
        assert all(torch.equal(got, want) for got in ranks(2, weighted, target))


def test_equal_costs_round_up_to_whole_elements():
    shards = shards_of(scores_of("normal"), 0, 1, cost=7)
    for unit in (1, 7):
        got = whole(shards, select([Group("g", 100, MODULES, shards, unit=unit)])[0])
        assert torch.equal(got, oracle(scores_of("normal"), 15))


def costly_on_one_rank() -> torch.Tensor:
    scores = scores_of("bf16")
    shards = [Shard("layer0", 0, scores, 7)] if comm.rank() == 0 else []
    return whole(shards, select([Group("g", 100, ["layer0"], shards, unit=7)])[0])


def test_ranks_without_any_element_take_part(ranks):
    for got in ranks(3, costly_on_one_rank):
        assert torch.equal(got, oracle(scores_of("bf16"), 15))


BOUNDS = {"layer0": (300, 400), "layer2": (0, 100), "layer4": (450, 500)}


def bounded(target: int) -> torch.Tensor:
    shards = shards_of(scores_of("bf16"), comm.rank(), comm.world_size())
    comm.calls.clear()
    removed = select([Group("g", target, MODULES, shards, BOUNDS)])[0]
    assert dict(comm.calls) == {"all_reduce": 3, "all_gather": 1}  # bounds and ties included
    return whole(shards, removed)


def test_bounds_equal_the_clamped_counts(ranks):
    scores, target = scores_of("bf16"), 900
    for total in range(NUM + 1):  # brute force over the threshold: clamp every module's count
        counts = oracle(scores, total)
        clamped = []
        for m, module in enumerate(MODULES):
            low, high = BOUNDS.get(module, (0, SIZES[m]))
            clamped.append(min(max(int(counts[BASES[m] : BASES[m] + SIZES[m]].sum()), low), high))
        if sum(clamped) == target:
            break
    for size in (1, 3):
        for got in ranks(size, bounded, target):
            assert [int(got[b : b + n].sum()) for b, n in zip(BASES, SIZES, strict=True)] == clamped


@pytest.mark.parametrize("target", [749, 1002])
def test_infeasible_bounds_are_refused_with_the_numbers(target):
    with pytest.raises(UserError, match=rf"g: a cost of {target} of 2500 .* allow 750 to 1001"):
        bounded(target)


def test_bf16_ties_do_not_miss_the_target_and_spread_over_modules():
    scores = torch.full((NUM,), 0.5)
    shards = shards_of(scores, 0, 1)
    removed = whole(shards, select([Group("g", 1250, MODULES, shards)])[0])
    shares = [removed[b : b + n].float().mean() for b, n in zip(BASES, SIZES, strict=True) if n > 100]
    assert removed.sum() == 1250
    assert all(abs(float(share) - 0.5) < 0.08 for share in shares)  # in index order: 1.0, 0.06, 0.0


def with_nan() -> str:
    scores = scores_of("normal")
    scores[BASES[2] + 5] = torch.nan
    try:
        select([Group("group 'g'", 10, MODULES, shards_of(scores, comm.rank(), comm.world_size()))])
    except UserError as error:
        return str(error)
    return ""


def test_nan_is_refused_by_module_on_all_ranks(ranks):
    for said in ranks(3, with_nan):
        assert "group 'g': 1 pruning scores of layer2 are NaN" in said


def test_inf_is_kept_and_minus_inf_stays_removed():
    scores = scores_of("normal")
    scores[:100], scores[100:300] = torch.inf, -torch.inf
    shards = shards_of(scores, 0, 1)
    removed = whole(shards, select([Group("g", NUM - 100, MODULES, shards)])[0])
    assert removed[:100].sum() == 0 and removed[100:].all()
    removed = whole(shards, select([Group("g", 50, MODULES, shards)])[0])  # less than was removed before
    assert removed.sum() == 200 and removed[100:300].all()
    with pytest.raises(UserError, match="allow 200 to 2400"):
        select([Group("g", NUM - 99, MODULES, shards)])


def test_a_higher_ratio_removes_a_superset():
    scores = scores_of("normal")
    first = oracle(scores, 1250).bool()
    scores[first] = -torch.inf
    scores = torch.where(first, scores, torch.rand(NUM, generator=torch.Generator().manual_seed(1)))
    shards = shards_of(scores, 0, 1)
    second = whole(shards, select([Group("g", 1750, MODULES, shards)])[0])
    assert second.sum() == 1750 and second[first].all()


def payload(num: int) -> int:
    sent = []
    original = comm.all_reduce
    comm.all_reduce = lambda t, op="sum": (sent.append(t.numel() * t.element_size()), original(t, op))[1]
    try:
        scores = torch.randn(num, generator=torch.Generator().manual_seed(comm.rank()))
        select([Group("g", num, ["a"], [Shard("a", comm.rank() * num, scores)])])
    finally:
        comm.all_reduce = original
    return sum(sent)


def test_payload_does_not_grow_with_the_elements(ranks):
    assert max(*ranks(2, payload, 10_000), *ranks(2, payload, 1_000_000)) <= 56 + 8 * 5120


def test_negative_control_scores_that_differ_by_an_ulp_differ_in_the_mask():
    scores = scores_of("normal")
    order = torch.argsort(scores)
    k, near = int(order[776]), int(order[777])
    scores[k], scores[near] = scores[near].clone(), scores[k].clone()
    shards = shards_of(scores, 0, 1)
    got = whole(shards, select([Group("g", 777, MODULES, shards)])[0])
    assert not torch.equal(got, oracle(scores_of("normal"), 777))


def test_keys_keep_the_order_of_floats():
    values = torch.tensor([-torch.inf, -2.0, -1e-40, 0.0, 1e-40, 2.0, torch.inf])
    keys = score_key(values)
    assert (keys.diff() > 0).all() and int(keys[3]) == int(score_key(torch.tensor([-0.0])))
    assert (tie_key(torch.arange(1000)) >= 0).all()


def test_no_groups_no_collective():
    comm.calls.clear()
    assert select([]) == [] and not comm.calls


def clamped(scores: torch.Tensor, target: int, cost: list[int]) -> torch.Tensor:
    """By brute force: the prefix of the sorted elements after which the clamped counts cost as much as asked."""
    order, counts = np.lexsort((tie_key(torch.arange(NUM)).numpy(), scores.numpy())), [0] * len(SIZES)
    module = np.repeat(np.arange(len(SIZES)), SIZES)
    gone = [int(np.isneginf(scores[b : b + n].numpy()).sum()) for b, n in zip(BASES, SIZES, strict=True)]
    limits = [BOUNDS.get(m, (0, n)) for m, n in zip(MODULES, SIZES, strict=True)]
    limits = [(max(low, g), max(high, g)) for (low, high), g in zip(limits, gone, strict=True)]

    def clamp() -> list[int]:
        return [min(max(c, low), high) for c, (low, high) in zip(counts, limits, strict=True)]

    for i in order:
        if sum(n * c for n, c in zip(clamp(), cost, strict=True)) >= target:
            break
        counts[module[i]] += 1
    out = torch.zeros(NUM, dtype=torch.int64)
    for m, n in enumerate(clamp()):
        out[[i for i in order if module[i] == m][:n]] = 1
    return out


EACH = [2, 6, 4, 2, 10]


def bounded_cost(kind: str, target: int) -> torch.Tensor:
    shards = shards_of(scores_of(kind), comm.rank(), comm.world_size(), [[c] * 3 for c in EACH])
    return whole(shards, select([Group("g", target, MODULES, shards, BOUNDS, unit=2)])[0])


@pytest.mark.parametrize("kind", ["normal", "few", "all_equal", "removed"])
def test_bounds_with_costs_take_what_brute_force_takes(ranks, kind):
    for target in (5600, 6200) if kind != "removed" else (6200, 6300):
        want = clamped(scores_of(kind), target, EACH)
        for size in (1, 3):
            for got in ranks(size, bounded_cost, kind, target):
                assert torch.equal(got, want)


def many_ties() -> tuple[int, int, dict[str, int]]:
    num, half = 200_000, comm.rank() * 100_000
    scores = torch.zeros(num // comm.world_size())
    comm.calls.clear()
    removed = select([Group("g", 70_001, ["a"], [Shard("a", half, scores)])])[0][0]
    calls = dict(comm.calls)
    mark = splitmix64(half + removed.nonzero().flatten()).sum()
    total = comm.all_reduce(torch.stack([removed.sum(), mark])).tolist()
    return total[0], total[1], calls


def test_more_ties_than_are_gathered_take_one_more_collective(ranks):
    [one] = ranks(1, many_ties)
    for found in ranks(2, many_ties):
        assert found[:2] == one[:2] and one[0] == 70_001
        assert found[2] == {"all_reduce": 4, "all_gather": 1}


def riders() -> tuple[list[int], list[int], dict[str, int]]:
    first, second = torch.full((2, 2), comm.rank()), torch.tensor([1, 2**62 * (comm.rank() == 0)])
    comm.calls.clear()
    below = select([Group("g", lambda num: num, MODULES, shards_of(scores_of("normal"), comm.rank(), comm.world_size()),
                          limit=0.25)], also=[first, second])[0]  # fmt: skip
    calls = dict(comm.calls)
    assert select([], also=[third := torch.ones(3, dtype=torch.int64)]) == []
    num = comm.all_reduce(torch.tensor(sum(int(x.sum()) for x in below)))
    return [int(num), *first.flatten().tolist()], [*second.tolist(), *third.tolist()], calls


def test_what_rides_along_is_summed_and_a_limit_becomes_a_target(ranks):
    for first, second, calls in ranks(3, riders):
        assert first == [int((scores_of("normal") < 0.25).sum()), 3, 3, 3, 3]
        assert second == [3, 2**62, 3, 3, 3] and sum(calls.values()) <= 3
