"""What the tests of NNI 3.0 expect of pruning, as black boxes, and what its released package got wrong."""

import re
from pathlib import Path

import pytest
import torch
from pruning_nets import attach, config
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax

from dist_compress import speedup
from dist_compress.blocks import Blocks
from dist_compress.errors import UserError
from dist_compress.pruning.defaults import register_defaults
from dist_compress.target import Coupling

NUM_STEPS, RATIO = 12, 0.75
NAMES = ["conv1", "conv2", "conv3", "fc1"]
EXAMPLE = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Small(nn.Module):
    """NNI's fixture, for images of 8 x 8 instead of 28 x 28: conv2, in 4 groups, and conv3 are added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, groups=4), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)
        self.fc1, self.fc2 = nn.Linear(32 * 4 * 4, 100), nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + self.bn3(self.conv3(x))).relu()
        return log_softmax(self.fc2(self.fc1(x.flatten(1)).relu()), -1)


@pytest.fixture(scope="module")
def coupling() -> Coupling:
    return speedup.coupling(Small(), EXAMPLE)


ENTRIES = [
    {"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["fc2"], "sparse_ratio": RATIO, "granularity": "out_channel"}
]
SCHEDULES = [
    {"name": "one_shot", "end": "10steps"},
    {"name": "agp", "start": "1steps", "end": "10steps", "num_decisions": 5},
    {"name": "linear", "start": "1steps", "end": "10steps", "num_decisions": 5},
]
METHODS = ["l1_norm", "l2_norm", "fpgm", "slim", "taylor", "apoz", "mean_activation", "group_fisher", "random"]
METHODS += ["level", "movement"]


def pruned(method, schedule, coupling):
    """NNI's run: some steps of training beside the pruner. No norm follows fc1, so slim cannot score it."""
    entries = [*ENTRIES, *([{"op_names": ["fc1"], "method": "l1_norm"}] if method == "slim" else [])]
    pruner, model, projection = attach(config(entries, method=method, schedule=schedule), Small(), coupling, NUM_STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(1)
    pruner.after_step(-1)
    for step in range(NUM_STEPS):
        x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        for micro in range(6):
            pruner.after_backward(step, micro)
        pruner.before_step(step)
        projection.edit_gradients()
        projection.restore()
        optimizer.step()
        pruner.after_step(step)
        projection.project()
    return pruner, model, projection


@pytest.mark.parametrize("schedule", SCHEDULES, ids=[s["name"] for s in SCHEDULES])
@pytest.mark.parametrize("method", METHODS)
def test_masks_have_the_ratio_biases_follow_and_added_layers_agree(method, schedule, coupling):
    pruner, model, _ = pruned(method, schedule, coupling)
    masks = {n: m.expand(model.get_parameter(n).shape) for n, m in pruner.masks().items()}
    for name in NAMES:
        weight = masks[f"{name}.weight"]
        rows = weight.flatten(1).any(1)
        assert int((~rows).sum()) == RATIO * len(rows), name
        assert torch.equal(masks[f"{name}.bias"], rows)
        if name != "conv2":  # its input channels go as well, so that the groups stay equal
            assert torch.equal(weight.flatten(1).all(1), rows)
    same = [masks[f"{n}.weight"].flatten(1).any(1) for n in ("conv2", "conv3")]
    assert torch.equal(*same)


def test_speedup_of_the_same(coupling):
    pruner, model, projection = pruned("l1_norm", SCHEDULES[0], coupling)
    pruner.detach()
    projection.finish()
    model.eval()
    small, _ = speedup.speedup(model, EXAMPLE)
    sizes = {
        n: (m.weight.shape[0], model.get_submodule(n).weight.shape[0]) for n, m in small.named_modules() if n in NAMES
    }
    assert sizes == {"conv1": (4, 16), "conv2": (8, 32), "conv3": (8, 32), "fc1": (25, 100)}
    assert small.conv2.groups == 4
    torch.testing.assert_close(small(*EXAMPLE), model(*EXAMPLE), rtol=1e-4, atol=1e-5)


def conv(entry):
    """A convolution of 3 channels under masks, and as it was."""
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 3, 3)
    before = nn.Conv2d(3, 3, 3)
    before.load_state_dict(layer.state_dict())
    cfg = config([{"op_names": ["conv"], "sparse_ratio": 0.34, "dependency_group_id": None, **entry}])
    pruner, model, projection = attach(cfg, nn.ModuleDict({"conv": layer}), Coupling())
    pruner.after_step(-1)
    projection.project()
    return layer, before, pruner.removed[0]


def test_a_mask_of_input_channels_is_the_input_without_them():
    layer, before, gone = conv({"granularity": "in_channel"})
    x = torch.randn(2, 3, 32, 32)
    assert int(gone.sum()) == 1 and torch.equal(layer(x), before(x * ~gone[:, None, None]))


def test_a_mask_of_output_channels_leaves_the_bias_if_it_does_not_follow():
    layer, before, gone = conv({})
    x = torch.randn(2, 3, 32, 32)
    assert int(gone.sum()) == 1 and not layer(x)[:, gone].any()
    layer, before, gone = conv({"target_settings": {"bias": {"sparse_ratio": 0.0}}})
    assert torch.equal(layer(x)[:, ~gone], before(x)[:, ~gone])
    assert torch.equal(layer(x)[:, gone], before.bias[gone][:, None, None].expand(2, -1, 30, 30))


def test_settings_by_class_and_by_name_agree(monkeypatch):
    from dist_compress.pruning.config_list import PRUNING

    found = []
    for key in (nn.Linear, "Linear"):
        monkeypatch.setattr(PRUNING, "registered", {})
        register_defaults(key, {"bias": {"sparse_ratio": 0.6}, "weight": {}})
        pruner, _, _ = attach(config([{"op_types": ["Linear"], "dependency_group_id": None}]), Small(), Coupling())
        found.append([(s.name, s.sparse_ratio) for s in pruner.settings])
    assert found[0] == found[1] == [("fc1", 0.5), ("fc1.bias", 0.6), ("fc2", 0.5), ("fc2.bias", 0.6)]


@pytest.mark.parametrize(
    ("kernel", "shape"), [([[1], "back", -1], (2,)), ([[1], "front", -1], (4,)), ([[1], "back", 1], (24,))]
)
def test_scaling(kernel, shape):
    """NNI's tensor of 2 x 3 x 4: means over what a block has, and back to the shape of the tensor."""
    tensor = torch.arange(24.0).view(2, 3, 4)
    blocks = Blocks.of(kernel, tensor.shape, "Linear", "it")
    means = blocks.rows(tensor).mean(1)
    wanted = {2: tensor.mean((1, 2)), 4: tensor.mean((0, 1)), 24: tensor.flatten()}[shape[0]]
    assert torch.equal(means, wanted) and blocks.spread(means).shape == tensor.shape


def test_channel_dependency():
    """Two concatenations of samples that are added tie all four; of channels, only by place; a sum over them, none."""

    class Four(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how
            for i in range(1, 5):
                setattr(self, f"conv{i}", nn.Conv2d(3, 6, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b, c, d = (getattr(self, f"conv{i}")(x) for i in range(1, 5))
            if self.how == "sum":
                return (a.sum(1) + b.sum(1)) * (c.sum(1) + d.sum(1))
            dim = 0 if self.how == "samples" else 1
            return (torch.cat([a, b], dim) + torch.cat([c, d], dim)).sum(1)

    def tied(how):
        return sorted(sorted(g.producers()) for g in speedup.coupling(Four(how), (torch.randn(2, 3, 4, 4),)).groups)

    assert tied("samples") == [["conv1", "conv2", "conv3", "conv4"]]
    assert tied("channels") == [["conv1", "conv3"], ["conv2", "conv4"]]
    assert all(len(group) == 1 for group in tied("sum"))


# ---- what the released package was measured to do, and this one does ----


def lone(rows, **keys):
    """{module: fraction removed} for linear layers of so many rows."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"l{i}": nn.Linear(4, n) for i, n in enumerate(rows)})
    for i, layer in enumerate(model.values()):
        with torch.no_grad():
            layer.weight.mul_(10.0**i)  # by magnitude alone the first layer would go as a whole
    entries = keys.pop("entries")
    pruner, _, _ = attach(config(entries, **keys), model, Coupling())
    for t in pruner.schedule:
        pruner.decide(t)
        yield {s.name: int(r.sum()) / s.num_units for s, r in zip(pruner.sets, pruner.removed, strict=True)}


def last(rows, entries, **keys):
    *_, found = lone(rows, entries=[{"op_types": ["Linear"], "dependency_group_id": None}, *entries], **keys)
    return found


def test_bounds_hold_in_every_member_of_a_global_group():
    one = {"op_types": ["Linear"], "global_group_id": 1}
    assert last((10, 10, 10), [one]) == {"l0": 0.9, "l1": 0.6, "l2": 0.0}  # NNI: 1.0, 0.28, 0.22 also with bounds
    assert last((10, 10, 10), [{**one, "max_sparse_ratio": 0.6}]) == {"l0": 0.6, "l1": 0.6, "l2": 0.3}
    assert last((10, 10, 10), [{**one, "min_sparse_ratio": 0.3}]) == {"l0": 0.9, "l1": 0.3, "l2": 0.3}
    with pytest.raises(UserError, match="asks to remove 15 of 30 channels, but 0 to 6 can go"):
        last((10, 10, 10), [{**one, "max_sparse_ratio": 0.2}])
    free = {"op_names": ["l2"], "max_sparse_ratio": 1.0}  # NNI left this one whole
    assert last((10, 10, 10), [{**one, "max_sparse_ratio": 0.3}, free])["l2"] == 0.9


def test_a_dependency_group_takes_part_in_a_global_group_with_its_bounds():
    pair = {"op_names": ["l0", "l1"], "dependency_group_id": "pair", "max_sparse_ratio": 0.4}
    found = last(
        (10, 10, 10), [pair, {"op_types": ["Linear"], "global_group_id": 1, "dependency_group_id": None}][::-1]
    )
    assert found == {"pair": 0.4, "l2": 0.6}


def test_the_later_entry_wins():
    found = last((12, 12), [{"op_names": ["l0"], "sparse_ratio": 0.25}, {"op_types": ["Linear"], "sparse_ratio": 0.75}])
    assert found == {"l0": 0.75, "l1": 0.75}


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("agp", [0.2, 0.3, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7, 0.8]),
        ("linear", [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8]),
    ],
)
def test_schedules_of_ten_decisions_on_ten_rows(name, ratios):
    schedule = {"name": name, "start": "0steps", "end": "9steps", "num_decisions": 10}
    entries = [{"op_types": ["Linear"], "dependency_group_id": None, "sparse_ratio": 0.8}]
    torch.manual_seed(0)
    pruner, _, _ = attach(config(entries, schedule=schedule), nn.ModuleDict({"l0": nn.Linear(4, 10)}), Coupling(), 10)
    found = []
    for t in pruner.schedule:
        pruner.decide(t)
        found.append(int(pruner.removed[0].sum()) / 10)
    assert found == ratios


@pytest.mark.parametrize(
    "entry",
    [
        {"op_types": ["Conv7d"]},  # NNI: no masks, no word
        {"op_names": ["conv9"]},  # NNI: KeyError
        {"op_types": ["Linear"], "granularity": [7, 1]},  # NNI: a bare assertion
        {"op_types": ["Linear"], "target_names": ["_input_x"]},  # NNI: accepted, never applied
        {
            "op_names": ["bn1"],
            "align": {"module_name": "conv2", "target_name": "weight", "dims": [0]},
        },  # NNI: assertion
    ],
)
def test_what_nni_took_silently_or_asserted_is_refused_with_its_key(entry, coupling):
    with pytest.raises(UserError, match=r"pruning.config_list\[0\]\.[a-z_]+"):
        attach(config([entry, {"op_names": ["fc1"]}]), Small(), coupling, example=EXAMPLE[0])


def test_the_parity_page_names_tests_that_exist():
    here = Path(__file__).parent
    page = (here.parents[1] / "docs/nni_parity.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", page)
    assert len(named) > 40
    for path, test in named:
        assert f"def {test}(" in (here / path).read_text(), f"{path}::{test}"
    rows = [line for line in page.splitlines() if line.startswith("| ") and "::" not in line]
    heads = [line for line in rows if line.startswith(("| NNI 3.0 |", "| test of NNI"))]
    assert [line for line in rows if line not in heads] == []  # every row names one
