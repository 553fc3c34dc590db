"""Selection, inheritance and every refusal of the config list."""

import pytest
import torch
from pruning_nets import Net, config
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from dist_compress.errors import UserError
from dist_compress.pruning.config_list import resolve

CONVS = ["stem", "a", "b", "depthwise", "free"]


def names(*entries, model=None, **keys):
    return [s.module for s in resolve(config(list(entries), **keys).pruning, model or Net())]


def refuse(*entries, **keys) -> str:
    with pytest.raises(UserError) as error:
        resolve(config(list(entries), **keys).pruning, Net())
    return str(error.value)


def test_selection():
    assert names({"op_types": ["Conv2d"]}) == CONVS
    assert names({"op_names": ["b", "stem"]}) == ["stem", "b"]  # model order
    assert names({"op_types": ["Linear"], "op_names_re": ["h"]}) == ["head"]
    assert names({"op_names_re": ["b"]}) == ["b"]  # norms match, too, but have no matrix to prune
    assert names({"op_names": ["a"], "op_names_re": ["fr.*"], "op_types": ["Conv2d"]}) == ["a", "free"]
    assert names({"op_types": ["Conv2d"], "exclude_op_names": ["a"]}) == ["stem", "b", "depthwise", "free"]
    assert names({"op_types": ["Conv2d"], "exclude_op_names_re": ["[ab]$", "d"]}) == ["stem", "free"]
    assert names({"op_names_re": [".*"], "exclude_op_types": ["Conv2d"]}) == ["head"]


def test_pattern_matches_from_the_start_only():
    assert names(
        {"op_names_re": ["e"]},
        {"op_names": ["a"]},
        model=nn.ModuleDict({"e1": nn.Linear(2, 2), "we": nn.Linear(2, 2), "a": nn.Linear(2, 2)}),
    ) == ["e1", "a"]


def test_types_are_exact_classes():
    class MyLinear(nn.Linear):
        pass

    model = nn.ModuleDict({"x": MyLinear(2, 2), "y": nn.Linear(2, 2)})
    assert names({"op_types": ["Linear"]}, model=model) == ["y"]
    assert names({"op_types": ["MyLinear"]}, model=model) == ["x"]


def test_a_parametrized_module_is_of_the_class_it_was():
    model = nn.ModuleDict({"x": parametrizations.weight_norm(nn.Linear(2, 2)), "y": nn.Linear(2, 2)})
    assert names({"op_types": ["Linear"], "exclude_op_names": ["x"]}, model=model) == ["y"]
    parametrize.remove_parametrizations(model["x"], "weight")
    assert names({"op_types": ["Linear"]}, model=model) == ["x", "y"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (parametrizations.weight_norm, "a parametrization: call torch.nn.utils.parametrize.remove_parametrizations"),
        (lambda m: prune.random_unstructured(m, "weight", 0.5), "a mask of torch.nn.utils.prune or a spectral norm"),
        (weight_norm, "a weight norm: call torch.nn.utils.remove_weight_norm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_computed_weight_is_refused_with_what_to_do(change, said):
    model = nn.ModuleDict({"x": change(nn.Linear(2, 2)), "y": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=r"selects x \(Linear\), which has no weight .* is computed by " + said):
        names({"op_types": ["Linear"]}, model=model)


def test_a_module_with_two_names_is_one_target():
    model = nn.ModuleDict({"x": nn.Linear(2, 2)})
    model["z"] = model["x"]
    assert names({"op_names": ["z"]}, model=model) == ["x"]


def test_later_entries_win_key_by_key_and_the_rest_is_inherited():
    entries = [
        {"op_types": ["Conv2d"], "sparse_ratio": 0.3, "max_sparse_ratio": 0.9},
        {"op_names": ["a"], "sparse_ratio": 0.6},
        {"op_names": ["head"], "method": "l2_norm"},
        {"op_names": ["a", "b"], "method": "taylor", "dependency_group_id": "none"},
    ]
    found = {s.module: s for s in resolve(config(entries, sparse_ratio=0.25, options={}).pruning, Net())}
    assert (found["a"].sparse_ratio, found["a"].max_sparse_ratio, found["a"].method) == (0.6, 0.9, "taylor")
    assert (found["b"].sparse_ratio, found["b"].dependency_group_id) == (0.3, None)
    assert (found["stem"].sparse_ratio, found["stem"].method) == (0.3, "l1_norm")
    assert (found["head"].sparse_ratio, found["head"].method) == (0.25, "l2_norm")
    assert found["a"].said_by("sparse_ratio") == "pruning.config_list[1].sparse_ratio=0.6"
    assert found["head"].said_by("sparse_ratio") == "pruning.sparse_ratio=0.25"


def test_null_takes_a_target_out_of_its_group():
    entries = [{"op_types": ["Conv2d"], "global_group_id": 1}, {"op_names": ["a"], "global_group_id": None}]
    found = {s.module: s.global_group_id for s in resolve(config(entries).pruning, Net())}
    assert found["stem"] == "1" and found["a"] is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"op_names_re": ["x.*"]}, "pruning.config_list[1].op_names_re='x.*' matches no module; names in this "),
        ({"op_names": ["stm"]}, "pruning.config_list[1].op_names='stm' matches no module; did you mean stem?"),
        ({"op_types": ["Conv3d"]}, "op_types='Conv3d' matches no module; types in this model: BatchNorm2d, Conv2d, "),
        ({"op_types": ["Conv2d"], "exclude_op_names": ["q"]}, "config_list[1].exclude_op_names='q' matches no"),
        ({"op_names_re": ["("]}, "pruning.config_list[1].op_names_re='(' is no regular expression"),
        ({"op_names": ["bn"]}, "selects bn (BatchNorm2d), which has no weight of 2 or more dimensions"),
        ({"op_types": ["BatchNorm2d"]}, "Prunable types in this model: Conv2d, Linear"),
        ({"op_types": ["Linear"], "op_names": ["a"]}, "pruning.config_list[1]: nothing is left"),
        ({"sparse_ratio": 0.5}, "pruning.config_list[1] selects nothing"),
        ({"op_types": "Conv2d"}, "op_types='Conv2d' must be a list of strings"),
        ({"op_types": ["Conv2d"], "sparse_ratoi": 0.5}, "config_list[1].sparse_ratoi: no such key. Did you mean spa"),
        ({"op_types": ["Conv2d"], "sparse_ratio": 1.0}, "[1].sparse_ratio=1.0 must be a number in [0, 1)"),
        ({"op_types": ["Conv2d"], "sparse_ratio": 1.5}, "[1].sparse_ratio=1.5 must be a number in [0, 1)"),
        ({"op_types": ["Conv2d"], "sparse_ratio": "0.5"}, "[1].sparse_ratio='0.5' must be a number"),
        ({"op_types": ["Conv2d"], "sparse_ratio": True}, "[1].sparse_ratio=True must be a number"),
        ({"op_types": ["Conv2d"], "max_sparse_ratio": -0.1}, "[1].max_sparse_ratio=-0.1 must be a number in [0, 1]"),
        (
            {"op_types": ["Conv2d"], "min_sparse_ratio": 0.6, "max_sparse_ratio": 0.4},
            "config_list[1].min_sparse_ratio=0.6 is above pruning.config_list[1].max_sparse_ratio=0.4",
        ),
        ({"op_types": ["Conv2d"], "max_sparse_ratio": 0.4}, "pruning.sparse_ratio=0.5 lies outside of"),
        ({"op_types": ["Conv2d"], "granularity": "row"}, "granularity='row': allowed are default, out_channel, "),
        (
            {"op_types": ["Conv2d"], "granularity": "element", "dependency_group_id": 3},
            "config_list[1].granularity='element' and pruning.config_list[1].dependency_group_id='3' exclude",
        ),
        ({"op_types": ["Conv2d"], "align": {"module_name": "a"}}, "must have exactly the keys module_name, target_"),
        (
            {"op_names": ["bn"], "align": {"module_name": "a", "target_name": "weight", "dims": []}},
            "align.dims=[] must be a list of dimensions",
        ),
        (
            {
                "op_names": ["bn"],
                "sparse_ratio": 0.5,
                "align": {"module_name": "a", "target_name": "weight", "dims": [0]},
            },
            "pruning.config_list[1].sparse_ratio=0.5 exclude each other: it follows",
        ),
        ({"op_types": ["Conv2d"], "options": [1]}, "options=[1] must be a mapping"),
    ],
)
def test_refusals_name_entry_key_value_and_what_there_is(entry, said):
    assert said in refuse({"op_names": ["head"]}, entry)


def test_contradictory_groups_name_both_entries():
    said = refuse({"op_types": ["Conv2d"], "global_group_id": "x"}, {"op_names": ["b"], "global_group_id": "y"})
    assert said.startswith("b is put in two groups: pruning.config_list[0].global_group_id='x' and ")
    assert "pruning.config_list[1].global_group_id='y'" in said
    one = {"op_names": ["a"], "global_group_id": "x", "sparse_ratio": 0.3}
    said = refuse(one, {"op_names": ["b"], "global_group_id": "x"})
    assert "a and b are in one group (global_group_id='x')" in said
    assert "pruning.config_list[0].sparse_ratio=0.3" in said and "pruning.sparse_ratio=0.5" in said
    said = refuse(one, {"op_names": ["b"], "global_group_id": "x", "sparse_ratio": 0.3, "granularity": "element"})
    assert "granularity='out_channel' by default" in said or "config_list[1].granularity='element'" in said
    said = refuse(one, {"op_names": ["b"], "global_group_id": "x", "sparse_ratio": 0.3, "method": "taylor"})
    assert "config_list[1].method='taylor'" in said


def test_nothing_to_inherit_is_refused():
    assert "[0] sets no sparse_ratio for head" in refuse({"op_names": ["head"]}, sparse_ratio=None)
    assert "[0] sets no method for head" in refuse({"op_names": ["head"]}, method=None)
    assert "config_list is empty" in refuse()


def test_long_models_are_listed_in_part():
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(40))
    with pytest.raises(UserError, match=r"28, 29, \.\.\. \(40 in all\)"):
        resolve(config([{"op_names": ["none"]}]).pruning, model)
    assert torch.is_tensor(model[0].weight)
