"""Prune with one call: the decision of a run, on a copy, verified."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import dist_compress
from dist_compress.config import Config, PruningConfig, ScheduleConfig
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.pruning import Pruner
from dist_compress.speedup import coupling


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x, scale=1.0):
        x = self.bn1(self.conv1(x)).relu()
        return {"logits": self.fc((x + self.conv2(x)).mean((2, 3))) * scale}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X = (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)


def test_a_pruned_copy_and_a_report(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    entries = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    for _ in range(2):  # the function is still one after its module was imported
        small, report = dist_compress.prune(net, X, {"scale": 2.0}, entries)
    assert small.conv1.out_channels == small.conv2.out_channels == small.fc.in_features == 4
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert report.parameters == (348, 160) and report.macs[1] < report.macs[0]
    assert report.difference < 1e-10 and report.verified.inputs[-1] == "batch size 4"
    [row] = report.targets
    assert (row["name"], row["asked"], row["given"]) == ("conv1 + conv2", 0.5, 0.5)
    assert set(report.seconds) == {"capture", "couple", "score", "plan", "apply", "verify", "measure"}
    assert set(report.masks) == {"conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "conv2.weight", "conv2.bias"}
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(report)
    assert "pruned" in str(report) == repr(report) and "348 -> 160" in console.export_text()


def test_the_decision_is_that_of_a_run(net):
    entries = [
        {"op_types": ["Conv2d"], "sparse_ratio": 0.4, "global_group_id": "a", "dependency_group_id": None},
        {"op_names": ["fc"], "granularity": "element", "sparse_ratio": 0.5},
    ]
    small, report = dist_compress.prune(net, X, {}, entries, "l2_norm", compute="params")
    schedule = ScheduleConfig(name="one_shot", start=0, end=0)
    config = Config(pruning=PruningConfig(method="l2_norm", schedule=schedule, compute="params", config_list=entries))
    pruner = Pruner(config)
    pruner.attach(Context(config, net, Projection(net), coupling(net, X), 1, 0, 1.0))
    pruner.decide(0)
    expected = {k: v for k, v in pruner.masks().items() if not v.all()}
    assert expected.keys() == report.masks.keys()
    assert all(torch.equal(v, report.masks[k]) for k, v in expected.items())
    assert int((small.fc.weight == 0).sum()) > 0  # single weights stay as zeros


def test_what_is_kept_is_told(net):
    small, report = dist_compress.prune(net, X, {}, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], round_to=3)
    assert small.conv1.out_channels == 6
    assert {b.reason for b in report.kept} == {"rounds its dim up to a multiple of 3"}
    entries = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5}, {"op_names": ["fc"], "sparse_ratio": 0.5}]
    _, report = dist_compress.prune(net, X, {}, entries)
    assert [row["name"] for row in report.kept_targets] == ["fc"] and "output of the model" in str(report)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "taylor"}, "scores by gradients or outputs"),
        ({"method": "l3_norm"}, "l3_norm"),
        ({"config_list": []}, "config_list is empty"),
        ({"config_list": [{"op_types": ["Conv3d"], "sparse_ratio": 0.5}]}, "Conv3d"),
        ({"compute": "flops"}, "compute='flops'"),
        ({"norm": "gone"}, "norm='gone'"),
        ({"keep": ["conv9"]}, "conv9"),
    ],
)
def test_what_cannot_be_done_is_refused(net, changed, message):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    given = {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], **changed}
    with pytest.raises(UserError, match=message):
        dist_compress.prune(net, X, {}, **given)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Tokens(nn.Module):
    """A table of positions that belongs to the model itself, added to what a layer makes."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x):
        return self.head((self.embed(x) + self.positions).relu().mean(1))


def test_parameters_that_no_entry_can_name_follow():
    entries = [{"op_names": ["embed"], "sparse_ratio": 0.5}]
    small, report = dist_compress.prune(Tokens(), (torch.randn(2, 5, 4),), config_list=entries)
    assert small.positions.shape == (1, 5, 4) and small.embed.out_features == 4 and report.difference < 1e-12
