"""Which units are decided together, what scores them, what goes with them, and what is kept and why."""

import pytest
import torch
from pruning_nets import Net, attach, config, member
from torch import nn

from dist_compress.errors import UserError
from dist_compress.hashing import splitmix64
from dist_compress.layout import Layout
from dist_compress.pruning import mask as masking
from dist_compress.target import Coupling, UnitGroup


def sets_of(*entries, **keys):
    pruner, _, _ = attach(config(list(entries), **keys))
    return {s.name: s for s in pruner.sets}, {k.name: k.reason for k in pruner.kept}


def test_coupled_units_are_one_set_and_depthwise_follows():
    sets, kept = sets_of({"op_names": ["stem", "b", "a"]})
    assert list(sets) == ["stem", "a"] and not kept
    stream = sets["stem"]
    assert stream.targets == ("stem", "b")
    assert [m.fqn for m in stream.scored] == ["stem.weight", "b.weight"]
    masked = "stem.weight bn.weight bn.bias b.weight b.bias bn_b.weight bn_b.bias depthwise.weight depthwise.bias"
    assert [m.fqn for m in stream.masked] == masked.split()


def test_what_is_coupled_with_no_target_is_kept_with_the_reason():
    sets, kept = sets_of({"op_names": ["stem", "free", "head"]})
    assert list(sets) == ["free"]
    assert kept == {"stem": "coupled with b, which is not a target", "head": "is an output of the model"}
    sets, kept = sets_of({"op_names": ["depthwise", "free"]})
    assert kept == {"depthwise": "coupled with stem, b, which is not a target"}


def test_nothing_left_to_prune_is_refused():
    with pytest.raises(UserError, match="no target can be pruned. head: is an output of the model"):
        sets_of({"op_names": ["head"]})
    with pytest.raises(UserError, match="a: the trace shows no channels of it"):
        attach(config([{"op_names": ["a"]}]), coupling=Coupling())


def test_coupled_targets_must_agree():
    with pytest.raises(UserError) as error:
        sets_of({"op_types": ["Conv2d"]}, {"op_names": ["b"], "sparse_ratio": 0.3})
    assert "stem and b are in one group (dependency_group_id='auto') but pruning.sparse_ratio=0.5" in str(error.value)
    assert "pruning.config_list[1].sparse_ratio=0.3" in str(error.value)


def test_in_channel_units_need_every_reader():
    sets, kept = sets_of({"op_names": ["b"], "granularity": "in_channel"})
    assert list(sets) == ["a"] and sets["a"].targets == ("b",)
    assert [m.fqn for m in sets["a"].masked] == ["a.weight", "a.bias", "bn_a.weight", "bn_a.bias", "b.weight"]
    sets, kept = sets_of({"op_names": ["b", "free"], "granularity": "in_channel"})
    assert kept == {"free": "coupled with a, which is not a target"}


def test_channels_are_decided_once():
    with pytest.raises(UserError, match="are the two ends of the same channels, which are decided once") as refused:
        sets_of({"op_names": ["a"]}, {"op_names": ["b"], "granularity": "in_channel"})
    assert "a (granularity='out_channel' by default)" in str(refused.value)
    assert "b (pruning.config_list[1].granularity='in_channel')" in str(refused.value)
    entry = {"op_names": ["b"], "granularity": "in_channel", "dependency_group_id": None}
    assert list(sets_of({"op_names": ["a"]}, entry)[0]) == ["a", "b"]  # these are the columns of b alone


def test_without_a_dependency_a_module_stands_alone_with_its_norm():
    sets, _ = sets_of({"op_names": ["stem", "free"], "dependency_group_id": "none"})
    assert [m.fqn for m in sets["stem"].masked] == ["stem.weight", "bn.weight", "bn.bias"]
    assert [m.fqn for m in sets["free"].masked] == ["free.weight", "free.bias"]
    assert [m.fqn for m in sets["free"].gates] == ["free.weight", "free.bias"]
    assert [m.fqn for m in sets["stem"].gates] == ["bn.weight", "bn.bias"]


def test_a_group_of_the_users_shares_one_mask():
    pruner, model, projection = attach(config([{"op_names": ["stem", "depthwise"], "dependency_group_id": 7}]))
    pruner.after_step(-1)
    masks = pruner.masks()
    assert [s.name for s in pruner.sets] == ["7"]
    assert torch.equal(masks["stem.weight"].flatten(), masks["depthwise.weight"].flatten())
    mean = (model.stem.weight.abs().sum((1, 2, 3)) + model.depthwise.weight.abs().sum((1, 2, 3))) / 2
    assert set((~masks["bn.bias"]).nonzero().flatten().tolist()) == set(mean.argsort()[:4].tolist())
    with pytest.raises(UserError, match="dependency_group_id='7': stem has 8 units and a has 6"):
        sets_of({"op_names": ["stem", "a"], "dependency_group_id": 7})
    with pytest.raises(UserError, match="stem and depthwise are in one group"):
        sets_of(
            {"op_names": ["stem", "depthwise"], "dependency_group_id": 7},
            {"op_names": ["stem"], "global_group_id": 1},
        )


def test_a_vector_that_is_added_follows_but_a_matrix_does_not():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.token, self.table = (
                nn.Linear(3, 4),
                nn.Parameter(torch.ones(1, 1, 4)),
                nn.Parameter(torch.ones(2, 4)),
            )

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Added()

    def group(*names):
        return UnitGroup("inner.lin", 4, (member("inner.lin.weight", 4), *names))

    token, table = member("inner.token", 4, dim=2), member("inner.table", 4, dim=1)
    pruner, _, _ = attach(config([{"op_types": ["Linear"]}]), Outer(), Coupling((group(token),)))
    assert pruner.masks()["inner.token"].shape == (1, 1, 4)
    with pytest.raises(UserError, match="inner.lin: coupled with inner, which is not a target"):
        attach(config([{"op_types": ["Linear"]}]), Outer(), Coupling((group(table),)))


def test_output_dims_of_modules_that_stand_alone():
    model = nn.ModuleDict({"emb": nn.Embedding(5, 3), "up": nn.ConvTranspose2d(4, 6, 2), "lin": nn.Linear(2, 7)})
    pruner, _, _ = attach(config([{"op_names_re": [".*"], "dependency_group_id": "none"}]), model, Coupling())
    assert [(s.name, s.num_units) for s in pruner.sets] == [("emb", 3), ("up", 6), ("lin", 7)]
    grouped = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2, groups=2)})
    with pytest.raises(UserError, match="up: granularity='out_channel' by default .* ConvTranspose2d with groups"):
        attach(config([{"op_names": ["up"], "dependency_group_id": "none"}]), grouped, Coupling())


def test_align_follows_another_mask():
    entries = [
        {"op_names": ["a"], "dependency_group_id": "none"},
        {"op_names": ["b"], "align": {"module_name": "a", "target_name": "weight", "dims": [0]}},
    ]
    model = Net()
    model.b = nn.Conv2d(6, 6, 3, padding=1)
    pruner, _, _ = attach(config(entries), model)
    pruner.after_step(-1)
    masks = pruner.masks()
    assert torch.equal(masks["a.weight"].flatten(), masks["b.weight"].flatten())
    assert torch.equal(masks["a.bias"], masks["b.bias"]) and int(masks["b.bias"].sum()) == 3
    entries[1]["align"]["module_name"] = "stem"
    with pytest.raises(UserError, match="stem.weight is not masked by pruning. Masked: a.weight"):
        attach(config(entries), model)
    entries[1]["align"] = {"module_name": "a", "target_name": "weight", "dims": [1]}
    with pytest.raises(UserError, match="dimension 1 of a.weight is 8, not 6"):
        attach(config(entries), model)


def test_element_masks_align_by_what_is_alive():
    entries = [
        {"op_names": ["a"], "granularity": "element"},
        {"op_names": ["bn_a"], "align": {"module_name": "a", "target_name": "weight", "dims": [0]}},
    ]
    pruner, model, _ = attach(config(entries))
    with torch.no_grad():
        model.a.weight[:2] = 0
    pruner.after_step(-1)
    assert pruner.masks()["bn_a.bias"].tolist() == [False, False, True, True, True, True]


def test_a_pruned_unit_is_zero_behind_the_norm():
    """Law 5: producers' rows and biases, affine weight and bias."""
    pruner, model, projection = attach(config([{"op_types": ["Conv2d"]}]))
    pruner.after_step(-1)
    projection.project()
    gone = pruner.removed[0]
    assert int(gone.sum()) == 4
    for name in ("stem.weight", "bn.weight", "bn.bias", "b.weight", "b.bias", "bn_b.weight", "depthwise.bias"):
        assert not model.get_parameter(name)[gone].any() and model.get_parameter(name)[~gone].all()
    x = torch.randn(2, 3, 4, 4)
    assert not model.bn(model.stem(x))[:, gone].any()


def test_fingerprint_is_the_sum_of_hashes_of_removed_positions():
    model = nn.Linear(3, 2)
    keep = torch.tensor([[True], [False]])
    whole = keep.expand(2, 3).contiguous()
    assert masking.fingerprint(Layout(model), {"weight": keep}) == masking.fingerprint(Layout(model), {"weight": whole})
    total = int(splitmix64(torch.tensor([3, 4, 5])).sum()) % 2**64
    assert masking.fingerprint(Layout(model), {"weight": keep}).whole % 2**64 == total
    assert masking.fingerprint(Layout(model), {"bias": torch.tensor([True, False])}) != masking.fingerprint(
        Layout(model), {"bias": torch.tensor([False, True])}
    )
    assert splitmix64(torch.tensor([0])).item() == 0xE220A8397B1DCDAF - 2**64  # splitmix64's first output
    assert masking.fingerprint(Layout(model), {}).whole == 0
