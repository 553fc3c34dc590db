"""Budgets: against brute force over all prefixes, in each currency, with bounds; and what cannot be reached."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_nets import COUPLING, Net, attach, config, unit_scores

from dist_compress.errors import UserError
from dist_compress.pruning.budget import Budget, Currency
from dist_compress.pruning.costs import Products
from dist_compress.pruning.setting import Setting
from dist_compress.pruning.sparsity import Ranked, count_bounds, share
from dist_compress.pruning.units import UnitSet
from dist_compress.target import LayerCost


def unit_set(num: int, ratio: float, low: float = 0.0, high: float = 1.0) -> UnitSet:
    setting = Setting("m", sparse_ratio=ratio, min_sparse_ratio=low, max_sparse_ratio=high, global_group_id="g")
    return UnitSet("m", num, (), (), (), (), ("m",), setting, 0)


def chain(sizes: list[int], ratio: float, bounds: list[tuple[float, float]]) -> Budget:
    """Layers in a row: each costs inputs times outputs, so costs are not additive."""
    sets = [unit_set(n, ratio, *b) for n, b in zip(sizes, bounds, strict=True)]
    ones = [torch.ones(n, dtype=torch.float64) for n in sizes]
    layers = [LayerCost("first", 3 * sizes[0], ((0.0, ((0, ones[0]),)),))]
    for i in range(1, len(sizes)):
        layers.append(
            LayerCost(f"l{i}", sizes[i - 1] * sizes[i], ((0.0, ((i - 1, ones[i - 1]),)), (0.0, ((i, ones[i]),))))
        )
    return Budget("g", sets, [Currency("macs", Products(sets, layers))], [True] * len(sets))


def brute(budget: Budget, scores: list[list[float]], ratio: float) -> list[np.ndarray]:
    """Take one unit after the other in global order, skipping what the bounds keep, until the cost is reached."""
    sets = budget.sets
    bases = np.concatenate([[0], np.cumsum([s.num_units for s in sets])])
    order = []
    for i, values in enumerate(scores):
        ties = Ranked.of(torch.tensor(values), torch.zeros(len(values), dtype=torch.bool), int(bases[i])).tie
        order += [(np.float32(v), int(ties[u]), i, u) for u, v in enumerate(values)]
    order.sort()
    removed = [np.zeros(s.num_units, bool) for s in sets]
    for i, s in enumerate(sets):
        low = math.ceil(Fraction(str(s.setting.min_sparse_ratio)) * s.num_units)
        for *_, u in [o for o in order if o[2] == i][:low]:
            removed[i][u] = True
    whole = budget.cost([r & False for r in removed])
    for _, _, i, u in order:
        if whole - budget.cost(removed) >= Fraction(str(ratio)) * whole:
            break
        n = sets[i].num_units
        most = min(n - 1, math.floor(Fraction(str(sets[i].setting.max_sparse_ratio)) * n))
        if not removed[i][u] and removed[i].sum() < most:
            removed[i][u] = True
    return removed


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_taking_one_unit_after_the_other(data):
    sizes = data.draw(st.lists(st.integers(2, 7), min_size=1, max_size=4))
    ratio = data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5]))
    bounds = [data.draw(st.sampled_from([(0.0, 1.0), (0.0, 0.9), (0.1, 0.8)])) for _ in sizes]
    budget = chain(sizes, ratio, bounds)
    scores = [data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), min_size=n, max_size=n)) for n in sizes]
    bases = np.concatenate([[0], np.cumsum(sizes)])
    ranked = [
        Ranked.of(torch.tensor(s), torch.zeros(len(s), dtype=torch.bool), int(b))
        for s, b in zip(scores, bases, strict=False)
    ]
    try:
        [wanted] = budget.wanted(1.0)
    except UserError:
        return
    got = budget.take(budget.currencies[0], ranked, wanted, 1.0, [])
    total = budget.cost([np.zeros(n, bool) for n in sizes])
    want = brute(budget, scores, ratio)
    if wanted == share(ratio) * total:  # else the bounds, rounded to units, stop it short of the ratio
        assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))
    for g, s in zip(got, budget.sets, strict=True):
        assert g.sum() <= s.num_units - 1
        assert g.sum() <= math.floor(share(s.setting.max_sparse_ratio) * s.num_units)


@pytest.mark.parametrize("compute", ["channels", "params", "macs"])
def test_the_ratio_is_met_within_one_unit(compute):
    for ratio in (0.1, 0.5, 0.7):
        entries = [{"op_types": ["Conv2d"], "global_group_id": 0}]
        pruner, model, _ = attach(config(entries, compute=compute, sparse_ratio=ratio))
        pruner.after_step(-1)
        budget = pruner.budgets["0"]
        removed = [gone.numpy().copy() for gone in pruner.removed]
        total = budget.cost([gone & False for gone in removed])
        spent = total - budget.cost(removed)
        assert spent >= share(ratio) * total
        last = max(  # giving back the most important unit that was removed falls below the target
            (float(score), i, u)
            for i, scores in enumerate(unit_scores(pruner))
            for u, score in enumerate(scores)
            if removed[i][u]
        )
        removed[last[1]][last[2]] = False
        assert total - budget.cost(removed) < share(ratio) * total
        [row] = pruner.results()["groups"]
        assert row["unit"] == compute and row["given"] == pytest.approx(float(spent / total))


def test_costs_by_hand():
    """3 of 8 units of the residual stream and 2 of 6 inner ones gone; the group is stem, a, b."""
    entries = [{"op_names": ["stem", "a", "b"], "global_group_id": 0}]
    gone = [np.arange(8) < 3, np.arange(6) < 2]
    costs = {}
    for compute in ("channels", "params", "macs"):
        pruner, _, _ = attach(config(entries, compute=compute))
        budget = pruner.budgets["0"]
        assert [s.name for s in budget.sets] == ["stem", "a"]  # the depthwise convolution follows
        costs[compute] = (budget.cost([g & False for g in gone]), budget.cost(gone))
    assert costs["channels"] == (14, 9)
    assert costs["params"] == (27 * 8 + (9 * 8 + 1) * 6 + (9 * 6 + 1) * 8, 27 * 5 + (9 * 5 + 1) * 4 + (9 * 4 + 1) * 5)
    assert costs["macs"] == (16 * (27 * 8 + 9 * 48 * 2), 16 * (27 * 5 + 9 * 20 * 2))


def test_units_outside_the_group_count_as_whole():
    entries = [{"op_names": ["a"], "global_group_id": 0}, {"op_names": ["free"]}]
    pruner, _, _ = attach(config(entries, compute="macs"))
    budget = pruner.budgets["0"]
    assert budget.cost([np.arange(6) < 3]) == 16 * 9 * 24  # the stream it reads is decided by nobody


def test_a_set_never_vanishes():
    pruner, _, _ = attach(config([{"op_types": ["Conv2d"], "global_group_id": 0, "sparse_ratio": 0.87}]))
    pruner.after_step(-1)
    assert [int((~gone).sum()) for gone in pruner.removed] == [1, 1, 1]
    with pytest.raises(
        UserError, match=r"global_group_id='0': .*sparse_ratio=0.9 asks to remove 21.6 of 24 channels, but 0 to 21"
    ):
        attach(config([{"op_types": ["Conv2d"], "global_group_id": 0, "sparse_ratio": 0.9}]))


def test_bounds_of_members():
    entries = [
        {"op_types": ["Conv2d"], "global_group_id": 0},
        {"op_names": ["free"], "min_sparse_ratio": 0.7},
        {"op_names": ["a"], "max_sparse_ratio": 0.2},
    ]
    pruner, _, _ = attach(config(entries))
    pruner.after_step(-1)
    counts = {s.name: int(gone.sum()) for s, gone in zip(pruner.sets, pruner.removed, strict=True)}
    assert counts["free"] >= 7 and counts["a"] <= 1 and sum(counts.values()) == 12
    entries[0]["max_sparse_ratio"] = 0.4
    entries[1]["max_sparse_ratio"] = 0.8
    with pytest.raises(UserError, match="max_sparse_ratio and min_sparse_ratio bound the rest"):
        attach(config(entries, sparse_ratio=0.6))


def test_a_bound_equal_to_the_ratio_may_round_below_it():
    entries = [{"op_types": ["Conv2d"], "global_group_id": 0, "max_sparse_ratio": 0.4}]
    pruner, _, _ = attach(config(entries, sparse_ratio=0.4))
    pruner.after_step(-1)
    assert [int(gone.sum()) for gone in pruner.removed] == [3, 2, 4]  # of 8, 6, 10


def test_ratios_mean_what_is_written():
    assert int(share(0.29) * 100) == 29 and int(0.29 * 100) == 28
    assert int(share(0.75, 1 / 3) * 4) == 1 and share(0.75, 1 - (2 / 3) ** 3) == Fraction(19, 36)
    assert count_bounds(30, Setting("m", "weight", 0.2, None, 0.1, 0.3), 1.0) == (3, 9)
    assert count_bounds(10, Setting("m", "weight", 0.2, None, 0.15, 0.35), 1.0) == (2, 3)


def test_macs_need_a_trace():
    from dist_compress.target import Coupling

    entries = [{"op_types": ["Conv2d"], "global_group_id": 0}]
    with pytest.raises(UserError, match="pruning.compute=macs: the trace has no MACs for stem"):
        attach(config(entries, compute="macs"), Net(), Coupling(COUPLING.groups))


def test_many_units_are_quick():
    budget = chain([4000] * 5, 0.5, [(0.0, 1.0)] * 5)
    generator = torch.Generator().manual_seed(0)
    none = torch.zeros(4000, dtype=torch.bool)
    ranked = [Ranked.of(torch.rand(4000, generator=generator), none, 4000 * i) for i in range(5)]
    removed = budget.take(budget.currencies[0], ranked, budget.wanted(1.0)[0], 1.0, [])
    total = budget.cost([r & False for r in removed])
    assert 0 <= (total - budget.cost(removed)) / total - Fraction(1, 2) < Fraction(1, 4000)


def test_prices_by_hand():
    """Of 2 units that cost 6 / 2 in their own layer and 8 / 2 in the next, and 4 that cost 8 / 4 there."""
    budget = chain([2, 4], 0.5, [(0.0, 1.0)] * 2)
    first, second = budget.prices(budget.currencies[0])
    mean = (2 * 7 + 4 * 2) / 6
    assert first.tolist() == pytest.approx([7 / mean] * 2) and second.tolist() == pytest.approx([2 / mean] * 4)


@pytest.mark.parametrize("dear", [0, 1])
def test_what_is_dear_goes_first(monkeypatch, dear):
    def prices(self: Budget, currency: Currency) -> list[torch.Tensor]:
        return [torch.full((s.num_units,), 1e9 if i == dear else 1.0) for i, s in enumerate(self.sets)]

    monkeypatch.setattr(Budget, "prices", prices)
    entry = {"op_names": ["a", "free"], "global_group_id": "g", "sparse_ratio": 0.2}
    pruner, _, _ = attach(config([entry]))
    pruner.after_step(-1)
    gone = [int(removed.sum()) for removed in pruner.removed]
    assert len(gone) == 2 and gone[dear] > 0 and gone[1 - dear] == 0
