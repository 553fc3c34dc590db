"""Global group x dependency group x align x granularity: what goes together has exact counts, the rest is refused with
both keys."""

import itertools

import pytest
import torch
from pruning_nets import Net, attach, config
from torch import nn

from dist_compress.errors import UserError
from dist_compress.target import Coupling

GLOBALS = (None, "g")
DEPENDENCIES = ("auto", "mine", None)
UNITS, BLOCKS, PATTERN = ("out_channel", "in_channel"), ("element", [2, 2, 1, 1], [[1], "back", -1]), "1:2"
NAMES = ["a", "b"]  # 6 out of 8 and 8 out of 6 channels


def decided(entries, **keys):
    """(pruner, {parameter: weights removed}) after the only decision."""
    pruner, model, _ = attach(config(entries, **keys))
    pruner.after_step(-1)
    masks = {n: m.expand(model.get_parameter(n).shape) for n, m in pruner.masks().items()}
    return pruner, {n: int((~m).sum()) for n, m in masks.items()}


def refuse(entries, *said, **keys):
    with pytest.raises(UserError) as error:
        attach(config(entries, **keys))
    for text in said:
        assert text in str(error.value), f"{text} is not in: {error.value}"


@pytest.mark.parametrize(("group", "dependency", "granularity"), list(itertools.product(GLOBALS, DEPENDENCIES, UNITS)))
def test_channels_go_with_every_group(group, dependency, granularity):
    """The stream has 8 channels, made by stem and b and read by a and free. Half of all go."""
    names = ["stem", "b"] if granularity == "out_channel" else ["a", "free"]
    more = {"op_names": names, "granularity": granularity, "dependency_group_id": dependency, "global_group_id": group}
    pruner, gone = decided([more])
    removed = [int(r.sum()) for r in pruner.removed]
    assert len(removed) == (2 if dependency is None else 1) and sum(removed) == 4 * len(removed)
    assert group or set(removed) == {4}
    for name in names:
        each = Net().get_parameter(f"{name}.weight").numel() // 8
        assert gone[f"{name}.weight"] % each == 0
    if not (group and dependency is None):
        assert all(gone[f"{n}.weight"] == Net().get_parameter(f"{n}.weight").numel() // 2 for n in names)
    follows = "bn.bias" in gone  # behind the producers, not behind what stands alone and reads
    assert follows == (granularity == "out_channel" or dependency == "auto")


@pytest.mark.parametrize(("group", "granularity"), list(itertools.product(GLOBALS, BLOCKS)))
def test_blocks_go_with_global_groups(group, granularity):
    entry = {"op_names": NAMES, "granularity": granularity, "global_group_id": group, "dependency_group_id": "none"}
    _, gone = decided([entry])
    whole = {"a.weight": 432, "b.weight": 432}
    if group is None:
        assert {n: gone[n] for n in whole} == {"a.weight": 216, "b.weight": 216}
    else:
        size = {"element": 1, str([2, 2, 1, 1]): 4}.get(str(granularity), 54)
        assert 432 <= sum(gone[n] for n in whole) < 432 + max(size, 72 if size == 54 else 0)


@pytest.mark.parametrize("granularity", BLOCKS)
def test_blocks_do_not_depend_on_each_other(granularity):
    entries = [{"op_names": NAMES, "granularity": granularity}, {"op_names": ["a"], "dependency_group_id": "mine"}]
    refuse(entries, "a: pruning.config_list[0].granularity=", "and pruning.config_list[1].dependency_group_id='mine'")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_group_id", "g"),
        ("dependency_group_id", "mine"),
        ("sparse_threshold", 0.1),
        ("max_sparse_ratio", 0.6),
        ("min_sparse_ratio", 0.4),
        ("internal_metric_block", 2),
    ],
)
def test_a_pattern_goes_with_nothing(key, value):
    entries = [{"op_names": ["a"], "granularity": PATTERN}, {"op_names": NAMES, key: value}]
    refuse(entries, "a: pruning.config_list[0].granularity='1:2' and", f"pruning.config_list[1].{key}={value!r}")


def test_a_pattern_has_its_own_ratio():
    entries = [{"op_names": ["a"], "sparse_ratio": 0.4}, {"op_names": ["a"], "granularity": PATTERN}]
    refuse(entries, "config_list[0].sparse_ratio=0.4 contradicts pruning.config_list[1].granularity='1:2'")
    _, gone = decided([{**entries[0], "sparse_ratio": 0.5}, entries[1]])
    assert gone["a.weight"] == 216


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_group_id", "g"),
        ("dependency_group_id", "mine"),
        ("internal_metric_block", 2),
        ("max_sparse_ratio", 0.6),
    ],
)
def test_what_is_aligned_is_asked_nothing_else(key, value):
    align = {"module_name": "stem", "target_name": "weight", "dims": [0]}
    entries = [{"op_names": ["stem"], "dependency_group_id": None}, {"op_names": ["b"], key: value}]
    refuse([*entries, {"op_names": ["b"], "align": align}], "config_list[2].align={", f"config_list[1].{key}={value!r}")
    same = {"op_names": ["b"], "align": align, "sparse_ratio": 0.5}
    refuse([entries[0], same], "config_list[1].align={", "config_list[1].sparse_ratio=0.5 exclude each other")


@pytest.mark.parametrize("key", ["internal_metric_block", "global_group_id"])
def test_a_threshold_is_of_one_target(key):
    entries = [{"op_names": ["a"], "sparse_threshold": 0.1}, {"op_names": ["a"], key: 2}]
    refuse(entries, "config_list[0].sparse_threshold=0.1 and pruning.config_list[1]." + key)


def test_parts_are_of_one_set():
    entries = [{"op_names": ["a"], "internal_metric_block": 2}, {"op_names": ["a"], "global_group_id": "g"}]
    refuse(entries, "config_list[1].global_group_id='g'", "config_list[0].internal_metric_block=2")
    refuse([{**entries[0], "granularity": "element"}], "granularity='element' and", "internal_metric_block=2")


@pytest.mark.parametrize(
    ("key", "value"),
    [("sparse_ratio", 0.3), ("granularity", "in_channel"), ("method", "l2_norm"), ("options", {"seed": 1})],
)
@pytest.mark.parametrize("group", ["global_group_id", "dependency_group_id"])
def test_members_agree(key, value, group):
    entries = [{"op_names": ["stem", "b"], group: "mine", "method": "random"}, {"op_names": ["b"], key: value}]
    said = "pruning.config_list[1]." + key
    refuse(entries, f"stem and b are in one group ({group}='mine')", said, f"Give both the same {key}")


@pytest.mark.parametrize(
    ("key", "value"), [("global_group_id", "g"), ("sparse_threshold", 0.2), ("max_sparse_ratio", 0.9)]
)
def test_members_of_a_dependency_group_agree_on_the_rest_too(key, value):
    entries = [{"op_names": ["stem", "b"], "dependency_group_id": "mine"}, {"op_names": ["b"], key: value}]
    refuse(entries, "(dependency_group_id='mine')", "pruning.config_list[1]." + key)


def test_a_global_group_of_coupled_sets_own_groups_and_what_stands_alone_with_aligns():
    entries = [
        {"op_names": ["stem", "b"], "global_group_id": "g"},
        {"op_names": ["a"], "global_group_id": "g", "dependency_group_id": None, "max_sparse_ratio": 0.4},
        {"op_names": ["free"], "global_group_id": "g", "dependency_group_id": "own", "min_sparse_ratio": 0.6},
        {"op_names": ["head"], "align": {"module_name": "free", "target_name": "weight", "dims": [0, 1]},
         "granularity": "element"},
    ]  # fmt: skip
    refuse(entries, "config_list[3].align", "dimension 0 of free.weight is 10, not 5")
    entries[3] = {
        "op_names": ["bn"], "target_names": ["weight"],
        "align": {"module_name": "free", "target_name": "weight", "dims": [1]},
    }  # fmt: skip
    pruner, gone = decided(entries)
    counts = {s.name: int(r.sum()) for s, r in zip(pruner.sets, pruner.removed, strict=True)}
    assert sum(counts.values()) == 12 and counts["a"] <= 2 and counts["free"] >= 6
    assert [row["given"] for row in pruner.results()["groups"]] == [0.5]
    assert gone["a.bias"] == counts["a"] and gone["free.bias"] == counts["free"] and gone["bn.bias"] == counts["stem"]


def test_a_bias_can_be_in_a_global_group_with_its_weight():
    own = {"target_settings": {"bias": {"granularity": "out_channel"}}}
    entries = [{"op_names": ["a"], "global_group_id": 1, "dependency_group_id": None, "sparse_ratio": 0.4, **own}]
    pruner, _ = decided(entries, compute="params")
    budget = pruner.budgets["1"]
    total = budget.cost([r.numpy() & False for r in pruner.removed])
    assert total == 6 * 72 + 6
    spent = total - budget.cost([r.numpy() for r in pruner.removed])
    assert spent == 72 * int(pruner.removed[0].sum()) + int(pruner.removed[1].sum()) >= 0.4 * total
    refuse(entries, "compute=macs: the trace has no MACs for a.bias (pruning.config_list[0].global", compute="macs")


# ---- align ----

MODEL = {"conv": (6, 4), "same": (6, 4), "wide": (4, 6)}


def aligned(source, entry, target="same"):
    """The masks of a model of three convolutions after one decision of `conv` and of what follows it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Conv2d(i, o, 2) for n, (o, i) in MODEL.items()})
    model["up"], model["emb"] = nn.ConvTranspose2d(4, 6, 2), nn.Embedding(3, 6)
    entries = [{"op_names": ["conv"], "dependency_group_id": None, **source}, {"op_names": [target], **entry}]
    pruner, _, _ = attach(config(entries), model, Coupling())
    pruner.after_step(-1)
    return {n: m.expand(model.get_parameter(n).shape) for n, m in pruner.masks().items()}


def to(dims, target="weight", module: str | None = "conv"):
    return {"align": {"module_name": module, "target_name": target, "dims": dims}}


SOURCES = [
    {},
    {"granularity": "in_channel"},
    {"granularity": "element", "sparse_ratio": 0.8},
    {"granularity": [1, 4, 2, 2]},
    {"granularity": "1:4"},
    {"granularity": "element", "sparse_threshold": 0.2},
    {"internal_metric_block": 2},
    {"global_group_id": 1},
]


@pytest.mark.parametrize("source", SOURCES)
def test_alive_where_anything_is_alive(source):
    masks = aligned(source, to([0]))
    rows = masks["conv.weight"].flatten(1).any(1)
    assert torch.equal(masks["same.weight"], rows.view(-1, 1, 1, 1).expand(6, 4, 2, 2))
    assert torch.equal(masks["same.bias"], rows)
    masks = aligned(source, {**to([-4]), "granularity": "in_channel"}, "wide")
    assert torch.equal(masks["wide.weight"], rows.view(1, -1, 1, 1).expand(4, 6, 2, 2)) and "wide.bias" not in masks
    masks = aligned(source, to([0]), "up")  # its outputs lie in dim 1
    assert torch.equal(masks["up.weight"], rows.view(1, -1, 1, 1).expand(4, 6, 2, 2))
    assert torch.equal(aligned(source, to([0]), "emb")["emb.weight"], rows.expand(3, 6))
    masks = aligned(source, {**to([0, 1]), "granularity": "element"})
    pairs = masks["conv.weight"].flatten(2).any(2)
    assert torch.equal(masks["same.weight"], pairs[:, :, None, None].expand(6, 4, 2, 2))
    assert torch.equal(masks["same.bias"], rows)  # by the first of the dims
    swapped = aligned(source, {**to([1, 0])}, "wide")["wide.weight"]
    assert torch.equal(swapped[:, :, 0, 0], pairs.T)
    masks = aligned(source, {**to([0, 1, 2, 3]), "granularity": [2, 2, 1, 1]})
    blocks = masks["conv.weight"].view(3, 2, 2, 2, 2, 2).any(3).any(1)
    assert torch.equal(masks["same.weight"], blocks.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_any_parameter_can_follow_and_be_followed():
    alone = {"target_settings": {"bias": {"sparse_ratio": 0.3, "granularity": "element"}}}
    masks = aligned(alone, {**to([0], "bias"), "target_names": ["bias"]})
    assert torch.equal(masks["same.bias"], masks["conv.bias"]) and int(masks["conv.bias"].sum()) == 5
    assert "same.weight" not in masks
    masks = aligned(
        {"granularity": "element", "sparse_ratio": 0.97, "target_settings": {"bias": to([0], module=None)}}, to([0])
    )
    assert torch.equal(masks["conv.bias"], masks["conv.weight"].flatten(1).any(1)) and not masks["conv.bias"].all()


def test_what_is_followed_may_follow():
    net = nn.ModuleDict({n: nn.Linear(4, 4) for n in "xyz"})
    entries = [
        {"op_names": ["x"], **to([0], module="y")},
        {"op_names": ["y"], **to([0], module="z")},
        {"op_names": ["z"], "dependency_group_id": None},
    ]
    pruner, _, _ = attach(config(entries), net, Coupling())
    pruner.after_step(-1)
    masks = pruner.masks()
    assert all(torch.equal(masks["z.bias"], masks[f"{n}.weight"][:, 0]) for n in "xyz")
    circle = [{"op_names": ["x"], **to([0], module="y")}, {"op_names": ["y"], **to([0], module="x")}, entries[2]]
    with pytest.raises(
        UserError, match=r"follow each other: pruning.config_list\[0\].align=.* and pruning.config_list\[1\].align"
    ):
        attach(config(circle), net, Coupling())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (to([0], "weight", "wide"), "wide.weight is not masked by pruning. Masked: conv.weight, conv.bias"),
        (to([1]), "dimension 1 of conv.weight is 4, not 6"),
        (to([4]), "conv.weight has 4 dimensions"),
        (to([0, 0]), "dims names a dimension twice"),
        ({**to([0, 1]), "target_names": ["bias"]}, "same.bias has 1 dimensions, too few for dims=[0, 1]"),
        ({**to([0]), "granularity": [4]}, "granularity=[4]: dimension 3 has size 2, which is no multiple of 4"),
        ({**to([0]), "granularity": "1:2"}, "config_list[1].granularity='1:2' exclude each other"),
    ],
)
def test_refused_aligns(entry, said):
    with pytest.raises(UserError) as error:
        aligned({}, entry)
    assert said in str(error.value) and "pruning.config_list[1]." in str(error.value)
