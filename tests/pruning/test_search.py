"""The search for ratios: it finds what uniform ratios miss, within the budget, the same on any number of ranks."""

import json
import math

import pytest
import torch
from pruning_nets import COUPLING, NUM_MICRO, Net, config
from torch import nn

from dist_compress import own_loop, pruning
from dist_compress.config import SearchConfig
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.pruning.search import Search
from dist_compress.pruning.sparsity import Ranked, by_share

ENTRIES = [{"op_names": ["stem", "b", "a", "free"], "global_group_id": "all"}]
MOST = 900  # parameters, of 1513
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


def known() -> nn.Module:
    """Of the 16 units of the first layer 12 do next to nothing; all 16 of the second matter alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        net[0].weight[4:] *= 1e-3
        net[0].bias[4:] = 0.0
        for row in net[2].weight:
            row /= row.norm()
    return net


def searched(seed=0, evaluations=60, start=0.0, **keys):
    """(ratios, history, objective of the result and of uniform ratios, decisions) through a loop of one's own."""
    model = known()
    with torch.no_grad():
        want = model(X)
    calls = []

    def evaluate(net):
        assert not net.training and not torch.is_grad_enabled()
        calls.append(float((net(X) - want).square().mean()))
        return calls[-1]

    entries = [{"op_types": ["Linear"], "exclude_op_names": ["4"], "global_group_id": "all"}]
    search = {"evaluations": evaluations, **keys}
    recipe = {"method": "l1_norm", "sparse_ratio": 0.4, "config_list": entries, "search": search}
    recipe["schedule"] = {"name": "linear", "start": start, "end": 1.0, "num_decisions": 2}
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    c = own_loop.attach(model, optimizer, {"seed": seed, "pruning": recipe}, (X,), total_steps=2, evaluate=evaluate)
    for _ in range(2):
        c.loss(model(X).sum()).backward()
        c.step()
    _, finished = c.finish()
    with torch.no_grad():
        left = float((model(X) - want).square().mean())
    assert len(calls) == evaluations
    found = finished.results["search"]
    return found["ratios"], found["history"], left, finished.results["decisions"]


def test_a_layer_that_is_known_to_be_sensitive_is_spared():
    ratios, history, left, decisions = searched()
    uniform = history[0]["objective"]
    assert history[-1]["best"] < uniform / 4 and left == pytest.approx(history[-1]["best"])
    assert ratios["0"] == 0.75 and ratios["2"] == 1 / 16  # 12 + 1 units are the least that reaches 0.4 of 32
    assert history[-1]["best"] == min(row["objective"] for row in history) and not all(r["taken"] for r in history)
    assert decisions[-1]["ratio"] == 13 / 32 and decisions[0]["ratio"] == 7 / 32


def test_the_same_at_any_number_of_ranks_and_another_with_another_seed(ranks):
    one = ranks(1, searched, 0, 12)[0]
    assert one[1] != searched(seed=5, evaluations=12)[1]
    for size in (2, 3):
        assert ranks(size, searched, 0, 12) == [one] * size


def attach(cfg, model, evaluate):
    [pruner] = pruning.build(cfg)
    projection = Projection(model)
    pruner.attach(Context(cfg, model, projection, COUPLING, NUM_MICRO, 4, 2.0, evaluate=evaluate))
    return pruner, projection


@pytest.mark.parametrize("compute", ["channels", "params", "macs", "at_most"])
def test_every_candidate_spends_the_budget_within_the_bounds(compute):
    asked = {"compute": compute}
    entries = [*ENTRIES, {"op_names": ["a"], "max_sparse_ratio": 0.5}, {"op_names": ["free"], "min_sparse_ratio": 0.2}]
    if compute == "at_most":
        asked = {"at_most": {"params": MOST}, "sparse_ratio": None}
        entries = [{k: v for k, v in entry.items() if k != "global_group_id"} for entry in entries]
    cfg = config(entries, **asked, search={"evaluations": 25, "perturbation": 3.0, "objective": "score"})
    model, seen = Net(), []

    def evaluate(num_samples):
        assert num_samples == 512 and projection.projected
        for unit_set, gone in zip(pruner.sets, pruner.removed, strict=True):
            weight = model.get_parameter(unit_set.scored[0].fqn)
            assert torch.equal(weight.flatten(1).eq(0).all(1), gone)
        seen.append([gone.clone() for gone in pruner.removed])
        return {"score": float(torch.rand(()))}

    pruner, projection = attach(cfg, model, evaluate)
    pruner.after_step(-1)
    [group] = pruner.budgets.values()
    most = MOST if compute == "at_most" else group.cost([gone.numpy() & False for gone in seen[0]]) / 2
    for removed in seen:
        left = group.cost([gone.numpy() for gone in removed])
        assert left <= most
        fewer = [group.cost([g.numpy() if i != k else _one_back(g) for k, g in enumerate(removed)]) for i in range(3)]
        assert max(fewer) > most  # not one unit too many
        stem, a, free = (int(gone.sum()) for gone in removed)
        assert stem <= 7 and a <= 3 and 2 <= free <= 9
    assert len({str(s) for s in seen}) > 5
    best = max(range(25), key=lambda i: pruner.search.history[i]["objective"])  # of a score more is better
    assert all(torch.equal(a, b) for a, b in zip(pruner.removed, seen[best], strict=True))
    assert not projection.projected


def _one_back(gone: torch.Tensor):
    """What is removed but for one."""
    back = gone.clone()
    if back.any():
        back[int(back.nonzero()[0])] = False
    return back.numpy()


def test_what_was_found_survives_a_resume_and_is_used_by_later_decisions():
    schedule = {"name": "linear", "start": 0.0, "end": "3steps", "num_decisions": 3}
    cfg = config(ENTRIES, schedule=schedule, search={"evaluations": 8})
    count = []

    def evaluate(num_samples):
        count.append(1)
        return {"loss": float(len(count) % 3)}

    pruner, _ = attach(cfg, Net(), evaluate)
    pruner.decide(0)
    again, _ = attach(cfg, Net(), evaluate)
    assert again.state_dict().keys() == pruner.state_dict().keys()
    again.load_state_dict(json.loads(json.dumps({"search": pruner.search.state()})) | {
        k: v for k, v in pruner.state_dict().items() if k != "search"
    })  # fmt: skip
    for p in (pruner, again):
        for t in list(p.schedule)[1:]:
            p.decide(t)
    assert len(count) == 8 and pruner.history == again.history
    assert pruner.search.found == again.search.found and pruner.results()["search"] == again.results()["search"]
    plain, _ = attach(config(ENTRIES, schedule=schedule), Net(), None)
    for t in plain.schedule:
        plain.decide(t)
    assert plain.history != pruner.history and plain.results()["search"] == {}


def test_annealing_takes_what_is_worse_at_the_start_and_less_and_less():
    heights = []
    search = Search(SearchConfig(evaluations=400), 0, {"g": 3}, lambda n: {})
    search.run(lambda weights: heights.append(sum(math.log(w) ** 2 for w in weights["g"])) or 1.0 + heights[-1])
    risen, current = [], 1.0
    for row in search.history[1:]:
        if row["taken"]:
            risen.append(max(row["objective"] - current, 0.0))
            current = row["objective"]
    third = len(risen) // 3
    assert max(risen[:third]) > 5 * max(risen[-third:]) > 0.0
    assert search.found == {"g": [1.0, 1.0, 1.0]}  # it began at the best
    assert search.history[0]["objective"] == 1.0


def test_weights_order_units_by_their_share_of_the_set():
    scores = torch.tensor([3.0, 1.0, 2.0, torch.inf])
    units = Ranked.of(scores, torch.tensor([False, False, True, False]), 0)
    heavy, light = by_share(units, 2.0), by_share(Ranked.of(torch.tensor([5.0, 4.0]), torch.zeros(2).bool(), 4), 1.0)
    assert heavy.order().tolist() == [2, 1, 0, 3] and light.order().tolist() == [1, 0]
    # shares: the set of four -inf (gone), 2/4 / 2, 3/4 / 2, inf; the set of two 1/2, 1
    assert heavy.key[0] < light.key[1] < light.key[0] < heavy.key[3] and heavy.key[1] < heavy.key[0]


@pytest.mark.parametrize(
    ("keys", "entries", "said"),
    [
        ({"evaluations": 5}, [{"op_names": ["a", "free"]}], "no global group has several sets of channels"),
        ({"evaluations": 5, "end_temperature": 1.0}, ENTRIES, "end_temperature=1.0 is above start_temperature=0.1"),
        ({"evaluations": 5, "objective": "acuracy"}, ENTRIES, "objective='acuracy': not measured. Choose one of loss"),
        ({"evaluations": 5, "start_temperature": 0.0}, ENTRIES, "search.start_temperature=0.0: must be above 0"),
        ({"evaluations": -1}, ENTRIES, "search.evaluations=-1: must be at least 0"),
    ],
)
def test_refused(keys, entries, said):
    with pytest.raises(UserError, match=said):
        attach(config(entries, search=keys), Net(), lambda n: {"loss": 1.0})[0].after_step(-1)


def test_without_a_measurement_it_is_refused():
    with pytest.raises(UserError, match="nothing measures the model here. Pass evaluate=function"):
        attach(config(ENTRIES, search={"evaluations": 5}), Net(), None)
    with pytest.raises(UserError, match="loss is nan with the uniform ratio"):
        pruner, _ = attach(config(ENTRIES, search={"evaluations": 5}), Net(), lambda n: {"loss": math.nan})
        pruner.after_step(-1)


def disagreeing():
    from dist_compress import comm

    pruner, _ = attach(config(ENTRIES, search={"evaluations": 5}), Net(), lambda n: {"loss": 1.0 + comm.rank()})
    try:
        pruner.after_step(-1)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_measure_differently_are_stopped(ranks):
    for said in ranks(2, disagreeing):
        assert "disagree on the objective of the search at step 0" in said
