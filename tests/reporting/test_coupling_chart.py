"""The drawing of coupling groups: every member has a mark, no two groups in one place, names are escaped."""

import re
from xml.etree import ElementTree

import torch

from dist_compress.reporting.coupling_chart import _lanes, coupling_chart
from dist_compress.target import Coupling, LayerCost, Member, UnitGroup

NAMES = ["", "a", "norm", "b<c", "d"]


def group(name, *members, blocked=""):
    index = torch.arange(4)[:, None]
    return UnitGroup(name, 4, tuple(Member(f"{m}.weight", 0, index, role) for m, role in members), blocked)


def test_every_member_has_a_mark_and_every_group_a_title():
    first = group("a", ("a", "producer"), ("norm", "affine"), ("b<c", "consumer"))
    last = group("b<c", ("b<c", "producer"), ("d", "consumer"), blocked="is an output & more")
    layers = tuple(LayerCost(n, 30, ((0.0, ((0, torch.ones(4)),)),)) if n == "a" else LayerCost(n, 35) for n in "ad")
    root = ElementTree.fromstring(coupling_chart(Coupling((first, last), layers), NAMES))
    marks = [e for e in root.iter() if e.tag.endswith(("circle", "path")) and len(e)]
    assert len(marks) == 5
    titles = [e.text for e in root.iter() if e.tag.endswith("title")]
    assert "b<c: 4 units, blocked: is an output & more" in titles
    text = "".join("".join(e.itertext()) for e in root if e.tag.endswith("text"))
    assert "4 units, 46% of the MACs" in text and "4 stay: is an output & more" in text
    places = {(m.get("cx"), m.get("cy")) if m.get("cx") else re.findall(r"[\d.]+ [\d.]+", m.get("d"))[0] for m in marks}
    assert len(places) == 5


def test_overlapping_groups_lie_in_lanes_of_their_own():
    spans = [(0, 3), (1, 2), (2, 5), (4, 6), (7, 7)]
    lanes = _lanes(spans)
    for i, (a, b) in enumerate(spans):
        for j, (c, d) in enumerate(spans[:i]):
            assert lanes[i] != lanes[j] or b < c or d < a
    assert max(lanes) == 2


def test_a_model_without_groups_is_an_empty_drawing():
    assert ElementTree.fromstring(coupling_chart(Coupling(), ["", "a"])) is not None
