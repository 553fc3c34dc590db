"""Method files: a user's own works like ours, and what is refused."""

import sys
import textwrap

import pytest
import torch
from pruning_nets import attach, config

from dist_compress.errors import UserError
from dist_compress.target import Coupling

OWN = """
from dataclasses import dataclass
import torch
from dist_compress.pruning.metric import Metric, View

@dataclass
class Options:
    first: int = 0

class Mine(Metric):
    def unit_scores(self, view: View) -> torch.Tensor:
        order = torch.arange(view.num_units, dtype=torch.float64)
        return (order - self.options.first) % view.num_units

    def block_scores(self, weight, grad):
        return torch.arange(len(weight))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    folder = tmp_path / "my_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "mine.py").write_text(OWN)
    (folder / "two.py").write_text(OWN + textwrap.dedent("class Other(Metric): ..."))
    (folder / "bare.py").write_text(OWN.replace("class Options", "class Settings"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def test_a_users_own_method(own):
    pruner, _, _ = attach(config([{"op_names": ["a"]}], method="my_pkg.mine", options={"first": 2}))
    pruner.after_step(-1)
    assert pruner.removed[0].tolist() == [False, False, True, True, True, False]
    entry = {"op_names": ["free"], "granularity": "element", "method": "my_pkg.mine", "sparse_ratio": 0.25}
    pruner, _, _ = attach(config([entry, {"op_names": ["a"]}]))
    pruner.after_step(-1)
    assert pruner.elements.removed["free.weight"].tolist() == [True] * 20 + [False] * 60
    assert int(pruner.removed[0].sum()) == 3  # the other entry with the method of the section


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("l3_norm", {}, "pruning.method='l3_norm': no such method. Available: apoz, fpgm, group_fisher, l1_norm,"),
        ("my_pkg.none", {}, "pruning.method='my_pkg.none': cannot import"),
        ("my_pkg.two", {}, "must define one subclass of Metric, but has Mine, Other"),
        ("my_pkg.bare", {}, "has no dataclass `Options`"),
        ("my_pkg.mine", {"frist": 1}, "pruning.options.frist: no such key"),
        ("l1_norm", {"p": 1}, "pruning.options.p"),
    ],
)
def test_refused_methods(own, name, options, said):
    with pytest.raises(UserError) as error:
        attach(config([{"op_names": ["a"]}], method=name, options=options))
    assert said in str(error.value)


def test_a_method_without_the_scores_asked_for_is_refused_at_the_start(own, tmp_path):
    lines = OWN[: OWN.index("    def block_scores")]
    (tmp_path / "my_pkg" / "units.py").write_text(lines)
    with pytest.raises(UserError, match="free: .*'element' needs `block_scores` of method 'my_pkg.units'"):
        attach(config([{"op_names": ["free"], "granularity": "element"}], method="my_pkg.units", options={"first": 2}))


def test_the_method_says_what_is_decided_as_one(own, tmp_path):
    lines = OWN.replace("class Mine(Metric):", 'class Mine(Metric):\n    granularity = "element"\n')
    (tmp_path / "my_pkg" / "single.py").write_text(lines)
    for granularity, given in (({}, "element"), ({"granularity": "out_channel"}, "out_channel")):
        pruner, _, _ = attach(config([{"op_names": ["free"], **granularity}], method="my_pkg.single"))
        assert [s.granularity for s in pruner.settings] == [given] and bool(pruner.elements.groups) == (not granularity)


def test_nan_scores_are_refused_by_name():
    pruner, model, _ = attach(config([{"op_names": ["free"]}]))
    with torch.no_grad():
        model.free.weight[3, 0] = torch.nan
    with pytest.raises(UserError, match=r"free: 1 pruning scores \(pruning.method='l1_norm'\) are NaN"):
        pruner.after_step(-1)


def test_empty_coupling_is_no_obstacle_for_elements():
    pruner, _, _ = attach(config([{"op_names": ["a"], "granularity": "element"}]), coupling=Coupling())
    assert pruner.change_steps() == [-1]
