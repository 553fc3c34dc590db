"""`pruning.at_most`: what the whole model may cost, beside sets that have ratios of their own; what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning_nets import COUPLING, TABLE, Net, attach, config, train, unit_scores

from dist_compress import pruning
from dist_compress.config import load
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.pruning.pruner import Pruner

CONV = [{"op_types": ["Conv2d"]}]
DENSE = sum(layer.macs for layer in COUPLING.layers)
PARAMS = sum(p.numel() for p in Net().parameters())


def pruner_of(entries: list[dict[str, Any]], **keys: Any) -> Pruner:
    """Attached, with the table of latencies of the net."""
    cfg = load({"pruning": {"method": "l1_norm", "config_list": entries, **keys}})
    model = Net()
    [pruner] = pruning.build(cfg)
    assert isinstance(pruner, Pruner)
    pruner.attach(Context(cfg, model, Projection(model), COUPLING, 6, 4, 2.0, latencies=TABLE))
    return pruner


def decided(entries: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    pruner = pruner_of(entries, **keys)
    pruner.after_step(-1)
    return pruner.results()


def trained(at_most: dict[str, float], method: str) -> list[Any]:
    """Decisions and limits of a gradual run: three decisions while training."""
    schedule = {"name": "linear", "start": "1steps", "end": "3steps", "num_decisions": 3}
    cfg = load({"pruning": {"method": method, "at_most": at_most, "schedule": schedule, "config_list": CONV}})
    model = Net()
    [pruner] = pruning.build(cfg)
    assert isinstance(pruner, Pruner)
    projection = Projection(model)
    pruner.attach(Context(cfg, model, projection, COUPLING, 6, 4, 2.0, latencies=TABLE))
    train(pruner, model, projection, range(4))
    return [pruner.results()["decisions"], pruner.results()["limits"]]


LIMITS = [({"macs": 9000}, "taylor"), ({"params": 700}, "l1_norm"), ({"latency_ms": 7.5}, "taylor")]


@pytest.mark.parametrize(("at_most", "method"), LIMITS)
def test_equal_at_any_number_of_ranks(ranks: Any, at_most: dict[str, float], method: str) -> None:
    one = ranks(1, trained, at_most, method)[0]
    decisions, [limit] = one
    assert len({d["fingerprint"] for d in decisions}) == 3
    assert limit["predicted"] <= limit["asked"] < limit["before"]
    for size in (2, 3, 4):
        assert ranks(size, trained, at_most, method) == [one] * size


def test_a_schedule_spends_its_part_of_the_way() -> None:
    schedule = {"name": "linear", "start": 0, "end": "2steps", "num_decisions": 2}
    pruner = pruner_of(CONV, at_most={"macs": 8000}, schedule=schedule)
    left = []
    for step in pruner.schedule:
        pruner.decide(step)
        left.append(pruner.results()["limits"][0]["predicted"])
    half = (DENSE + 8000) / 2
    assert left[1] <= 8000 < left[0] <= half and left[0] > half - 2000  # a unit of the stream


def test_one_unit_less_would_miss_it() -> None:
    """The last unit that went was needed: with it back the model costs too much."""
    pruner = pruner_of(CONV, at_most={"macs": 9000})
    pruner.after_step(-1)
    budget = pruner.budgets["pruning.at_most"]
    gone = [r.numpy().copy() for r in pruner.removed]
    assert budget.cost(gone) <= 9000
    weighed = budget.weighed(budget.currencies[0], unit_scores(pruner))
    scores = [(float(s), i, u) for i, own in enumerate(weighed) for u, s in enumerate(own) if gone[i][u]]
    _, i, u = max(scores)
    gone[i][u] = False
    assert budget.cost(gone) > 9000


@pytest.mark.parametrize(
    ("at_most", "binding"),
    [({"macs": 9000, "params": 1200}, [True, False]), ({"macs": 18000, "params": 500}, [False, True])],
)
def test_the_limit_that_binds(at_most: dict[str, float], binding: list[bool]) -> None:
    """The other one holds with room to spare, since it is met by what this one asks."""
    rows = decided(CONV, at_most=at_most)["limits"]
    assert [row["binding"] for row in rows] == binding
    assert all(row["predicted"] <= row["asked"] for row in rows)
    [alone] = decided(CONV, at_most={k: v for k, v in at_most.items() if binding[list(at_most).index(k)]})["limits"]
    assert alone == rows[binding.index(True)]


def test_targets_with_a_ratio_of_their_own_come_first() -> None:
    entries = [*CONV, {"op_names": ["free"], "sparse_ratio": 0.5}]
    results = decided(entries, at_most={"params": 700})
    [own] = results["groups"]
    assert (own["name"], own["asked"], own["given"]) == ("free", 0.5, 0.5)
    assert results["limits"][0]["predicted"] <= 700
    both = decided([*CONV, {"op_names": ["free"], "sparse_ratio": 0.5}], at_most={"params": 880})
    assert both["groups"] == results["groups"]  # the limit is met with less of the others
    elements = decided([{"op_names": ["a"]}, {"op_names": ["head"], "granularity": "element", "sparse_ratio": 0.5}],
                       at_most={"macs": 15000})  # fmt: skip
    assert elements["limits"][0]["predicted"] <= 15000 and elements["groups"][0]["given"] == 0.5


def test_bounds_hold() -> None:
    entries = [*CONV, {"op_names": ["a"], "max_sparse_ratio": 0.2}, {"op_names": ["free"], "min_sparse_ratio": 0.7}]
    pruner = pruner_of(entries, at_most={"macs": 9000})
    pruner.after_step(-1)
    gone = {s.name: int(r.sum()) for s, r in zip(pruner.sets, pruner.removed, strict=True)}
    assert gone["a"] <= 1 and gone["free"] >= 7


def test_latency_as_the_currency_of_a_group() -> None:
    entries = [{"op_types": ["Conv2d"], "global_group_id": 0, "sparse_ratio": 0.2}]
    pruner = pruner_of(entries, compute="latency")
    pruner.after_step(-1)
    [row] = pruner.results()["groups"]
    assert row["unit"] == "latency" and 0.2 <= row["given"] < 0.3
    assert int(pruner.removed[2].sum()) == 0  # whose units save nothing


@pytest.mark.parametrize(
    ("entries", "keys", "said"),
    [
        (CONV, {"at_most": {"macs": 100}}, r"pruning.at_most.macs=100: of \d+ MACs of the dense model \d+ MACs can go, "
         r"which leaves \d+ MACs"),
        (CONV, {"at_most": {"params": PARAMS}}, f"pruning.at_most.params={PARAMS}: the dense model has {PARAMS} "
         "parameters already, so nothing would go"),
        (CONV, {"at_most": {"latency_ms": 3.9}}, "at_most.latency_ms=3.9: of 10 ms of the dense model 6 ms can go"),
        ([{"op_names": ["a"]}], {"at_most": {"macs": 1000}}, "or name more targets in pruning.config_list"),
        (CONV, {"at_most": {"macs": 9000}, "sparse_ratio": 0.5},
         "at_most.macs=9000 and pruning.sparse_ratio=0.5 both say how much goes. Set pruning.sparse_ratio=null"),
        ([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], {"at_most": {"macs": 9000}},
         "pruning.at_most.macs=9000: every target has a ratio or threshold of its own"),
        ([*CONV, {"op_names": ["head"], "granularity": "element"}], {"at_most": {"macs": 9000}},
         r"head: pruning.config_list\[1\].granularity='element' has no part in pruning.at_most.macs=9000"),
        ([{"op_types": ["Conv2d"], "dependency_group_id": None}], {"at_most": {"macs": 9000}},
         r"dependency_group_id=None has no part in .*such channels may stay"),
        ([{"op_types": ["Conv2d"], "internal_metric_block": 2}], {"at_most": {"macs": 9000}},
         "internal_metric_block=2 and pruning.at_most.macs=9000 exclude each other"),
        ([{"op_names": ["a"], "global_group_id": 1}, {"op_names": ["free"], "global_group_id": 2}],
         {"at_most": {"macs": 9000}}, "a .*global_group_id='1'.* and free .*global_group_id='2'.* are one group"),
        ([{"op_names": ["a"], "global_group_id": 1}, {"op_names": ["free"], "global_group_id": 1, "sparse_ratio": 0.1}],
         {"at_most": {"macs": 9000}}, "a .*global_group_id='1'.* and free .*global_group_id='1'.* are one group"),
        (CONV, {"at_most": {"macs": 0}}, "pruning.at_most.macs=0.0: must be above 0"),
        (CONV, {"at_most": {"flops": 1}}, "pruning.at_most.flops: no such key"),
        (CONV, {"at_most": {"macs": "few"}}, "pruning.at_most.macs='few': expected float or null"),
        (CONV, {"latency": {"batch_size": 0}}, "pruning.latency.batch_size=0: must be at least 1"),
        (CONV, {"compute": "flops"}, "pruning.compute='flops': no such choice"),
        (CONV, {}, r"sets no sparse_ratio for stem, nor does pruning.sparse_ratio. Set one, or pruning.at_most"),
    ],
)  # fmt: skip
def test_what_users_get_wrong(entries: list[dict[str, Any]], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pruner_of(entries, **keys)


def test_what_the_others_took_is_known_at_the_last_decision() -> None:
    """Attaching, a threshold may take anything; once it took nothing, the limit is out of reach."""
    entries = [{"op_names": ["a"]}, {"op_names": ["stem", "b", "free"], "sparse_threshold": 0.0}]
    pruner = pruner_of(entries, at_most={"macs": 4000})
    with pytest.raises(UserError, match="pruning.at_most.macs=4000: of .* can go"):
        pruner.after_step(-1)


def test_a_group_of_one_id_may_share_the_limit() -> None:
    entries = [{"op_types": ["Conv2d"], "global_group_id": "all"}]
    assert decided(entries, at_most={"macs": 9000}) == {**decided(CONV, at_most={"macs": 9000})}


def test_ratios_are_as_they_were() -> None:
    pruner, _, _ = attach(config([{"op_types": ["Conv2d"], "global_group_id": 0}], compute="params"))
    pruner.after_step(-1)
    assert pruner.results()["limits"] == []
    assert torch.cat(pruner.removed).sum() > 0
