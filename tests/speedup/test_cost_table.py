"""Costs as functions of the units kept: counts against sizes written by hand."""

import pytest
import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.speedup import cost_table
from dist_compress.speedup.cost_table import TOGETHER, GroupCost, as_latencies, load, save


def test_rows_follow_the_sizes(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = cost_table(model, (torch.randn(3, 6),), fractions=(0.25, 0.5), time_s=0.1)
    known = [("0", 8, [2, 4, 8]), ("2", 4, [1, 2, 4]), (TOGETHER, 12, [3, 6, 12])]
    assert [(row.name, row.num_units, row.kept) for row in table] == known
    first, second, together = table
    assert together.params == [6 * a + a + a * b + b + 2 * b + 2 for a, b in ((2, 1), (4, 2), (8, 4))]
    assert first.params == [6 * k + k + 4 * k + 4 + 10 for k in (2, 4, 8)]
    assert first.macs == [3 * (6 * k + 4 * k + 8) for k in (2, 4, 8)]
    assert second.params == [56 + 8 * k + k + 2 * k + 2 for k in (1, 2, 4)]
    assert first.activation_bytes == sorted(first.activation_bytes) and first.latency_ms == sorted(first.latency_ms)
    assert first.at(3, "macs") == (first.macs[0] + first.macs[1]) / 2 and first.at(8, "params") == first.params[-1]
    save(table, tmp_path / "costs.json")
    assert load(tmp_path / "costs.json") == table
    latencies = as_latencies(table)
    assert [row.kept for row in latencies.groups] == [(2, 4, 8), (1, 2, 4)]
    assert latencies.together.ms == tuple(together.latency_ms) and len({row.latency_ms[-1] for row in table}) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_batch_and_groups_of_two_units():
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 2))
    table = cost_table(model, (torch.randn(3, 6),), fractions=(0.1, 0.9), time_s=0.05, batch_size=1)
    assert [row.kept for row in table] == [[1, 2], [1, 2]]  # at least one unit goes, at least one stays


def test_what_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="other.json: is no cost table"):
        load(tmp_path / "other.json")
    with pytest.raises(UserError, match="old.json: has no groups, or no last row '.all groups.'"):
        as_latencies([GroupCost("a", 4, [2, 4], [1, 2], [1, 2], [1, 2], [1.0, 2.0])], "old.json")
    with pytest.raises(UserError, match="fractions"):
        cost_table(nn.Linear(2, 2), (torch.randn(1, 2),), fractions=(1.5,))
    row = GroupCost("a", 4, [2, 4], [1, 2], [1, 2], [1, 2], [1.0, 2.0])
    with pytest.raises(UserError, match="cost='flops' is not in the table; allowed are macs, params"):
        row.at(3, "flops")
