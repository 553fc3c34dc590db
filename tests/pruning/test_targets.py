"""Targets beside the weight: names, settings for each, defaults by type, the order in which values win."""

import pytest
import torch
from pruning_nets import Net, attach, config
from torch import nn

from dist_compress.config_list import overrides
from dist_compress.errors import UserError
from dist_compress.pruning import register_defaults
from dist_compress.pruning.config_list import PRUNING, resolve
from dist_compress.sites import Sites
from dist_compress.target import Coupling

ALONE = {"dependency_group_id": None}


class Scaled(nn.Module):
    """A layer of one's own: no weight, and names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(PRUNING, "registered", {})
    register_defaults(Scaled, {"kernel": {"max_sparse_ratio": 0.8}, "shift": {"sparse_ratio": 0.25}})


def found(*entries, model=None, **keys):
    return {s.name: s for s in resolve(config(list(entries), **keys).pruning, model or Net())}


def refuse(*entries, model=None, **keys) -> str:
    with pytest.raises(UserError) as error:
        attach(config(list(entries), **keys), model)
    return str(error.value)


def test_a_short_value_is_for_all_targets_and_target_settings_go_before_it():
    entry = {"op_names": ["a"], "sparse_ratio": 0.5, "target_settings": {"bias": {"sparse_ratio": 0.6}}, **ALONE}
    settings = found(entry)
    assert {name: s.sparse_ratio for name, s in settings.items()} == {"a": 0.5, "a.bias": 0.6}
    said = settings["a.bias"].said_by("sparse_ratio")
    assert said == "pruning.config_list[0].target_settings.bias.sparse_ratio=0.6"
    pruner, _, _ = attach(config([entry]))
    pruner.after_step(-1)
    masks = pruner.masks()
    assert int((~masks["a.bias"]).sum()) == 3 and int((~masks["a.weight"][:, 0, 0, 0]).sum()) == 3
    assert {s.name: s.targets for s in pruner.sets} == {"a": ("a",), "a.bias": ("a.bias",)}
    assert not masks["bn_a.bias"][~masks["a.weight"].flatten()].any()  # the norm still follows the weight


def test_target_names_choose():
    assert list(found({"op_names": ["a", "stem"], "target_names": ["bias", "weight"]})) == ["stem", "a", "a.bias"]
    assert list(found({"op_names": ["a"], "target_names": ["bias"]})) == ["a.bias"]
    assert list(found({"op_names": ["bn"], "target_names": ["weight"]})) == ["bn"]
    assert list(found({"op_names_re": [".*"], "target_names": ["bias"], "exclude_op_types": ["BatchNorm2d"]})) == [
        "a.bias",
        "b.bias",
        "depthwise.bias",
        "free.bias",
        "head.bias",
    ]
    model = nn.ModuleDict({"own": Scaled(), "lin": nn.Linear(4, 4)})
    assert list(found({"op_names": ["own"], "target_names": ["kernel"]}, model=model)) == ["own.kernel"]


def test_a_norm_can_be_a_target():
    pruner, model, _ = attach(config([{"op_names": ["bn"], "target_names": ["weight"], "sparse_ratio": 0.25}]))
    pruner.after_step(-1)
    gone = ~pruner.masks()["bn.weight"]
    assert set(gone.nonzero().flatten().tolist()) == set(model.bn.weight.abs().argsort()[:2].tolist())
    assert torch.equal(pruner.masks()["bn.bias"], ~gone)


def test_parameters_of_any_name_are_pruned():
    model = nn.ModuleDict({"own": Scaled()})
    entries = [{"op_names": ["own"], "target_names": ["kernel"], **ALONE}]
    pruner, _, _ = attach(config([*entries, {"op_names": ["own"], "target_names": ["shift"]}]), model, Coupling())
    pruner.after_step(-1)
    masks = pruner.masks()
    assert masks["own.kernel"].shape == (4, 1) and int(masks["own.kernel"].sum()) == 2
    assert int(masks["own.shift"].sum()) == 2
    assert {row["name"] for row in pruner.results()["groups"]} == {"own.kernel", "own.shift"}


def test_defaults_from_python_yaml_and_entries(registered):
    model = nn.ModuleDict({"own": Scaled(), "lin": nn.Linear(4, 4)})
    assert list(found({"op_types": ["Scaled"]}, model=model)) == ["own.kernel", "own.shift"]
    own = {"Scaled": {"kernel": {"max_sparse_ratio": 0.7, "granularity": "element"}}}
    settings = found({"op_names": ["own"]}, {"op_names": ["lin"]}, model=model, default_settings=own)
    assert settings["own.kernel"].max_sparse_ratio == 0.7 and settings["own.kernel"].granularity == "element"
    assert settings["own.shift"].sparse_ratio == 0.25 and settings["lin"].max_sparse_ratio == 1.0
    said = settings["own.kernel"].said_by("max_sparse_ratio")
    assert said == "pruning.default_settings.Scaled.kernel.max_sparse_ratio=0.7"
    entry = {"op_names": ["own"], "max_sparse_ratio": 0.9, "sparse_ratio": 0.5}
    settings = found(entry, model=model, default_settings=own)
    assert (settings["own.kernel"].max_sparse_ratio, settings["own.shift"].sparse_ratio) == (0.9, 0.5)
    assert overrides(list(settings.values())) == []  # a default is there to be overridden


def test_defaults_cover_activations(registered):
    model = nn.Sequential(Scaled(), nn.Identity())
    model.get_submodule("0").forward = lambda x: (x, x + 1)  # two outputs, one name for both
    model.get_submodule("1").forward = lambda pair: pair[0]
    register_defaults(Scaled, {"kernel": {}, "_output_": {"sparse_ratio": 0.25}, "_input_x": {"max_sparse_ratio": 0.9}})
    own = {"Scaled": {"_output_1": {"sparse_ratio": 0.2, "granularity": "element"}}}
    cfg = config([{"op_types": ["Scaled"]}], default_settings=own).pruning
    settings = {s.name: s for s in resolve(cfg, model, Sites(model, (torch.ones(2, 6),)))}
    assert list(settings) == ["0._input_0", "0.kernel", "0._output_0", "0._output_1"]
    assert [s.sparse_ratio for s in settings.values()] == [0.5, 0.5, 0.25, 0.2]
    assert settings["0._input_0"].max_sparse_ratio == 0.9 and settings["0._output_1"].granularity == "element"
    assert settings["0._output_0"].granularity == "per_channel"


def test_refused_defaults(monkeypatch):
    monkeypatch.setattr(PRUNING, "registered", {})
    with pytest.raises(UserError, match=r"register_defaults\(Scaled\).kernel.sparse_ratoi: no such key"):
        register_defaults(Scaled, {"kernel": {"sparse_ratoi": 0.8}})
    said = refuse({"op_names": ["a"]}, default_settings={"Conv2d": {"weight": {"sparse_ratio": 3}}})
    assert "pruning.default_settings.Conv2d.weight.sparse_ratio=3 must be a number in [0, 1)" in said
    said = refuse({"op_names": ["a"]}, default_settings={"Conv2e": {"weight": {}}})
    assert "pruning.default_settings.Conv2e: no module of this type. Types: BatchNorm2d, Conv2d, Linear." in said


def test_a_later_way_to_say_how_much_takes_the_place_of_an_earlier_one():
    align = {"module_name": "a", "target_name": "weight", "dims": [0]}
    entries = [
        {"op_types": ["Conv2d"], "sparse_ratio": 0.3},
        {"op_names": ["free"], "sparse_threshold": 0.1},
        {"op_names": ["bn_a"], "align": align},
        {"op_names": ["free", "a"], "sparse_ratio": 0.4},
        {"op_names": ["b"], "sparse_ratio": None},
    ]
    settings = found(*entries)
    assert settings["free"].sparse_threshold is None and settings["free"].sparse_ratio == 0.4
    assert settings["b"].said_by("sparse_ratio") == "pruning.sparse_ratio=0.5"
    assert settings["bn_a"].align and settings["bn_a.bias"].align  # the bias goes along
    assert overrides(list(settings.values())) == [
        "pruning.config_list[3].sparse_ratio=0.4 overrides pruning.config_list[0].sparse_ratio=0.3 for a",
        "pruning.config_list[4].sparse_ratio=None overrides pruning.config_list[0].sparse_ratio=0.3 for b",
        "pruning.config_list[1].sparse_threshold=0.1 overrides pruning.config_list[0].sparse_ratio=0.3 for free",
        "pruning.config_list[3].sparse_ratio=0.4 overrides pruning.config_list[1].sparse_threshold=0.1 for free",
    ]


def test_overrides_are_said_once_for_all_their_targets_and_in_the_results():
    entries = [{"op_types": ["Conv2d"], "sparse_ratio": 0.3}, {"op_types": ["Conv2d"], "sparse_ratio": 0.4}]
    pruner, _, _ = attach(config(entries))
    [line] = pruner.notes()
    assert line.endswith("=0.4 overrides pruning.config_list[0].sparse_ratio=0.3 for stem, a, b, depthwise, free")
    pruner.after_step(-1)
    assert pruner.results()["overrides"] == [line]
    many = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))
    entries = [{"op_types": ["Linear"], "sparse_ratio": r} for r in (0.1, 0.1, 0.5)]
    [line] = overrides(list(found(*entries, model=many).values()))
    assert line.endswith("for 0, 1, 2, 3, 4 and 2 more")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"target_names": ["gamma"]}, "config_list[0].target_names: no selected module has a parameter 'gamma'; they"),
        (
            {"target_names": ["_input_1"]},
            "config_list[0].target_names: no selected module has an activation '_input_1'; they have _input_0 (input)",
        ),
        ({"target_settings": {"_output_x": {}}}, "[0].target_settings: no selected module has an activation '_output"),
        ({"target_settings": {"bias": {"op_names": []}}}, "config_list[0].target_settings.bias.op_names: no such key"),
        (
            {"target_names": ["weight"], "target_settings": {"bias": {}}},
            "config_list[0].target_names=['weight'] leaves",
        ),
        ({"target_names": []}, "config_list[0].target_names=[] names no target"),
        ({"apply_method": "add"}, "config_list[0].apply_method='add' is for activations: the masked weights of a are"),
        ({"apply_options": {"constant": 1}}, "config_list[0].apply_options={'constant': 1} is for activations"),
        ({"apply_method": "bypass"}, "config_list[0].apply_method='bypass' would decide masks and leave them out"),
        ({"granularity": "per_channel"}, "config_list[0].granularity='per_channel' is for activations, but a has o"),
        (
            {"target_settings": {"bias": {"sparse_ratio": 0.2}}},
            "a.bias: pruning.config_list[0].target_settings.bias.spa",
        ),
        ({"sparse_ratio": 0.1, "target_settings": {"bias": {"align": 3}}}, "target_settings.bias.align=3 must have"),
    ],
)
def test_refusals(entry, said):
    assert said in refuse({"op_names": ["a"], **entry})


def test_a_bias_cannot_leave_the_channels_of_the_trace():
    said = refuse({"op_names": ["a"]}, {"op_names": ["bn_a"], "target_names": ["weight"], "sparse_threshold": 0.2})
    assert said.startswith("bn_a: pruning.config_list[1].sparse_threshold=0.2 asks for a mask of its own, but it goes")
    said = refuse({"op_names": ["a"], "target_settings": {"bias": {"sparse_ratio": 0.2}}})
    assert (
        "goes along with the channels of a (dependency_group_id='auto' by default). Set dependency_group_id: null"
        in said
    )
