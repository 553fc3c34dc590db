"""The nearest of several hidden states."""

import pytest
from distillation_nets import attach, hidden, losses


def test_the_least_loss_counts():
    links = ["layer2", "extra"]
    distiller, student, teacher = attach([{"op_names": ["layer2"], "link": links}], method="dynamic_layerwise")
    own = hidden(student, "layer2")
    apart = [float((own - hidden(teacher, name)).square().mean((1, 2, 3)).sum()) for name in links]
    assert abs(apart[0] - apart[1]) > 0.1
    [found] = losses(distiller, student).values()
    assert float(found) == pytest.approx(min(apart), rel=1e-5)


def test_each_width_has_a_map_of_its_own():
    entries = [{"op_names": ["head"], "link": ["head", "wide"]}]
    distiller, _, _ = attach(entries, method="dynamic_layerwise")
    assert distiller.translators.shapes == [(9, 10)]
    assert [linked.translator for linked in distiller.layers[0].linked] == [None, 0]
