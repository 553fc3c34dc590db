"""The part of config lists that all nouns share, by a noun made up for it: bits for parameters and activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from dist_compress import config_list
from dist_compress.config_list import Noun, in_model_order, merge, overrides, register
from dist_compress.errors import UserError
from dist_compress.sites import Sites


@dataclass
class Setting(config_list.Setting):
    NOUN = "rounding"
    INHERITED = ("method",)

    bits: int = 8
    scale: float | None = None
    fuse: str | None = None
    method: str = "nearest"
    options: dict[str, Any] = field(default_factory=dict)


class Rounding(Noun[Setting]):
    setting = Setting
    takes_back = ("bits", "scale")
    ids = ("fuse",)
    alternatives = ("bits", "scale")
    belongs = {"method": "options"}

    def values(self, given, where):
        if given.get("bits") is not None and not 1 <= given["bits"] <= 8:
            raise UserError(f"{where}.bits={given['bits']} must be 1 to 8.")
        return given

    def check_target(self, name, what):
        if name == "bias":
            raise UserError(f"{what}: a bias is never rounded.")

    def usual(self, module, entry):
        return ["_input_", "weight", "_output_"] if hasattr(module, "weight") else ["_output_"]

    def unfit(self, modules, entry):
        return f"nothing to round. Types: {', '.join(sorted(modules.types()))}."


class Two(nn.Module):
    def forward(self, left, right):
        return {"sum": left + right, "product": left * right}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.two, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), Two(), nn.ReLU()

    def forward(self, x):
        out = self.two(self.a(x), right=self.b(x))
        return out["sum"] + out["product"]


X = torch.ones(2, 3)


def found(*entries, defaults=None, sites=True, noun=None):
    model = Net()
    merged = merge(noun or Rounding(), entries, defaults or {}, model, Sites(model, (X,)) if sites else None)
    return {s.path: s for s in in_model_order(merged, model)}


def refused(*entries, **keys) -> str:
    with pytest.raises(UserError) as error:
        found(*entries, **keys)
    return str(error.value)


def test_targets_are_those_of_the_noun_or_those_that_are_named():
    assert list(found({"op_types": ["Linear", "Two"]})) == [
        "a._input_0", "a.weight", "a._output_0", "b._input_0", "b.weight", "b._output_0",
        "two._output_product", "two._output_sum",
    ]  # fmt: skip
    assert list(found({"op_names": ["two"], "target_names": ["_input_"]})) == ["two._input_0", "two._input_1"]
    assert list(found({"op_names": ["a", "two"], "target_names": ["weight", "_output_sum"]})) == [
        "a.weight",
        "two._output_sum",
    ]


def test_names_of_one_site_are_one_target_and_the_more_special_one_wins():
    [first, second] = found(
        {"op_names": ["two"], "target_names": ["_input_left", "_input_1"], "bits": 6},
        {
            "op_names": ["two"],
            "target_names": ["_input_"],
            "target_settings": {"_input_0": {"bits": 3}, "_input_": {"bits": 4, "fuse": "f"}},
        },
    ).values()
    assert (first.name, first.bits, first.fuse) == ("two._input_0", 3, "f")
    assert (second.name, second.bits, second.fuse) == ("two._input_1", 4, "f")
    assert first.said_by("bits") == "rounding.config_list[1].target_settings._input_0.bits=3"
    assert first.said_by("scale") == "scale=None by default"
    assert first.said_by("method") == "rounding.method='nearest'"
    assert overrides([first, second]) == [
        "rounding.config_list[1].target_settings._input_.bits=4 overrides rounding.config_list[0].bits=6 for "
        "two._input_0, two._input_1",
        "rounding.config_list[1].target_settings._input_0.bits=3 overrides "
        "rounding.config_list[1].target_settings._input_.bits=4 for two._input_0",
    ]


def test_null_alternatives_and_what_belongs_together():
    entries = [
        {"op_names": ["a"], "target_names": ["weight"], "bits": 3, "method": "up", "options": {"p": 1}},
        {"op_names": ["a"], "target_names": ["weight"], "scale": 0.5},
    ]
    [setting] = found(*entries).values()
    assert (setting.bits, setting.scale, setting.options) == (8, 0.5, {"p": 1})
    assert "bits" not in setting.sources
    [setting] = found(*entries, {"op_names": ["a"], "target_names": ["weight"], "method": "down"}).values()
    assert setting.options == {}
    [setting] = found(*entries, {"op_names": ["a"], "target_names": ["weight"], "scale": None}).values()
    assert setting.scale is None and "scale" not in setting.sources
    assert setting.sources[""] == "rounding.config_list[2]"


def test_defaults_by_type_cover_activations_from_python_and_yaml():
    noun = Rounding()
    register(noun, Two, {"_input_": {"bits": 5}, "_output_sum": {"bits": 6}})
    assert {p: s.bits for p, s in found({"op_names": ["two"]}, noun=noun).items()} == {
        "two._input_0": 5,
        "two._input_1": 5,
        "two._output_sum": 6,
    }
    yaml = {"Two": {"_input_right": {"bits": 2}}}
    settings = found({"op_names": ["two"], "target_settings": {"_output_sum": {"bits": 1}}}, noun=noun, defaults=yaml)
    assert {p: s.bits for p, s in settings.items()} == {"two._input_0": 5, "two._input_1": 2, "two._output_sum": 1}
    assert settings["two._input_1"].said_by("bits") == "rounding.default_settings.Two._input_right.bits=2"
    assert overrides(list(settings.values())) == []
    assert Rounding().registered == {}  # of one noun alone
    register(noun, "Two", {})
    assert len(found({"op_names": ["two"]}, noun=noun)) == 2


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"op_names": ["a"], "bist": 3}, "rounding.config_list[0].bist: no such key. Did you mean bits?"),
        ({"op_names": ["a"], "bits": 9}, "rounding.config_list[0].bits=9 must be 1 to 8"),
        ({"op_names": ["a"], "target_names": ["bias"]}, "target_names='bias': a bias is never rounded"),
        ({"op_names": ["a"], "target_settings": {"_input_0": {"bits": 0}}}, "list[0].target_settings._input_0.bits=0"),
        (
            {"op_names": ["two"], "target_names": ["_input_middle"]},
            "rounding.config_list[0].target_names: no selected module has an activation '_input_middle'; they have "
            "_input_0 (left), _input_1 (right), _output_sum, _output_product.",
        ),
        (
            {"op_names": ["two"], "target_names": ["_input_0"], "target_settings": {"_input_right": {}}},
            "target_settings._input_right: rounding.config_list[0].target_names=['_input_0'] leaves _input_right out",
        ),
        ({"op_names": ["idle"], "target_names": ["_output_0"]}, "_output_0'; idle did not run on the example input"),
        ({"op_names": ["idle"]}, "rounding.config_list[0] selects idle (ReLU), which has nothing to round"),
        ({"op_names": ["two"], "target_names": ["weight"]}, "no selected module has a parameter 'weight'; they have"),
    ],
)
def test_refusals(entry, said):
    assert said in refused(entry)


def test_two_groups_and_no_example():
    said = refused({"op_names": ["a"], "fuse": "x"}, {"op_names": ["a"], "fuse": "y"})
    assert said.startswith("a._input_0 is put in two groups: rounding.config_list[0].fuse='x' and rounding.config_l")
    assert "_output_ needs an example input" in refused({"op_names": ["idle"]}, sites=False)


def test_the_model_runs_only_if_an_activation_is_named():
    class Broken(Net):
        def forward(self, x):
            raise AssertionError

    model = Broken()
    sites = Sites(model, (X,))
    assert len(merge(Rounding(), [{"op_names": ["a"], "target_names": ["weight"]}], {}, model, sites)) == 1
    with pytest.raises(AssertionError):
        merge(Rounding(), [{"op_names": ["a"]}], {}, model, sites)
