"""LSTM, GRU and RNN: hidden units go from every gate, layer and direction at once; integers follow."""

import copy

import pytest
import torch
from torch import nn

from dist_compress import speedup


class Net(nn.Module):
    def __init__(self, kind, head=6, **settings):
        super().__init__()
        self.first = nn.Linear(3, 5, bias=False)
        self.rnn = getattr(nn, kind)(5, 6, **settings)
        self.head = nn.Linear(2 * head if settings.get("bidirectional") else head, 2)

    def forward(self, x):
        return self.head(self.rnn(self.first(x).relu())[0])


def test_projected_state_and_cells_go_apart():
    torch.manual_seed(0)
    model, x = Net("LSTM", head=4, batch_first=True, proj_size=4), torch.randn(2, 4, 3)
    for group in speedup.coupling(model, (x,)).groups:
        if not group.blocked:
            speedup.mask_units(model, group, torch.arange(max(1, group.num_units // 3)))
    plan = speedup.plan(model, (x,))
    small = speedup.apply(copy.deepcopy(model), plan)
    assert speedup.verify(model(x), small(x)) < 1e-6
    assert (small.rnn.input_size, small.rnn.hidden_size, small.rnn.proj_size) == (4, 4, 3), plan.blocked
    assert small.rnn.weight_hr_l0.shape == (3, 4) and small.rnn.weight_hh_l0.shape == (16, 3)


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LSTM", {"batch_first": True}),
        ("GRU", {"batch_first": True}),
        ("RNN", {"batch_first": True, "nonlinearity": "relu"}),
        ("LSTM", {"batch_first": True, "num_layers": 2, "bidirectional": True, "bias": False}),
    ],
    ids=str,
)
def test_hidden_units_and_inputs_go(kind, settings, shrink):
    model = Net(kind, **settings)
    rows = [unit + 6 * gate for gate in range(GATES[kind]) for unit in (1, 4)]
    slices = {f"rnn.{name}": rows for name, _ in model.rnn.named_parameters()}
    small, plan = shrink(model, lambda batch: torch.randn(batch, 4, 3), {**slices, "first.weight": [2]})
    assert small.rnn.hidden_size == 4 and small.rnn.input_size == 4, plan.blocked
    assert small.rnn.weight_hh_l0.shape == (4 * GATES[kind], 4) and small.rnn.weight_ih_l0.shape[1] == 4
    assert small.head.in_features == len(small.head.weight[0]) == (8 if settings.get("bidirectional") else 4)


def test_one_gate_alone_does_not_free_a_unit(shrink):
    small, _ = shrink(Net("LSTM", batch_first=True), lambda batch: torch.randn(batch, 4, 3), {
        f"rnn.{name}": [1, 4] for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    })  # fmt: skip
    assert small.rnn.hidden_size == 6


def test_units_of_a_cell_are_one_group():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTMCell(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0])

    model = Cells()
    groups = [g for g in speedup.coupling(model, (torch.randn(2, 3, 5),)).groups if not g.blocked]
    (group,) = [g for g in groups if g.num_units == 6]
    members = {(m.fqn, m.dim): m.index.shape[1] for m in group.members}
    assert members[("cell.weight_ih", 0)] == 4 and members[("cell.weight_hh", 1)] == 1
    assert ("head.weight", 1) in members
