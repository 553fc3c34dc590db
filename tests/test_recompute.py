"""Forwards that run again change no bit of a run, and nothing that is counted is counted twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from block_net import Net
from fused_runs import AGAIN, BACKENDS, NETS, dressed, heard, job_of, whole_run
from torch import nn

from dist_compress.calling import Headless, call_headless
from dist_compress.errors import UserError
from dist_compress.recompute import Recompute, recomputing
from dist_compress.training.batchnorm import BatchNormTracker


@contextmanager
def deaf(name: str | None) -> Iterator[None]:
    """Inside, a module of the package does not know what is run again."""
    with ExitStack() as stack:
        if name is not None:
            stack.enter_context(mock.patch(f"dist_compress.{name}.recomputing", lambda: False))
        yield


@pytest.fixture(scope="module", params=NETS)
def plain(request: Any, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The run of one rank that keeps what it computes."""
    found = ranks(1, whole_run, str(tmp_path_factory.mktemp("plain")), request.param, timeout_s=100)[0]
    assert not found["shrunk"] and found["smaller"] < 0.95 and len(found["bits"]["decisions"]) == 2
    return request.param, found["bits"]


def test_a_run_has_the_bits_of_one_that_keeps_its_activations(ranks, tmp_path, plain):
    net, bits = plain
    found = ranks(2, whole_run, str(tmp_path), net, AGAIN, timeout_s=100)[0]
    assert len(found["shrunk"]) >= 2 and not found["delivered"]  # and it is what was asked for
    assert found["bits"] == bits


def test_and_so_on_two_ranks_that_hold_parts(ranks, tmp_path):
    overrides = ["transformer", *BACKENDS["zero-3"]]
    bits = ranks(2, whole_run, str(tmp_path / "plain"), *overrides, timeout_s=100)[0]["bits"]
    found = ranks(2, whole_run, str(tmp_path / "again"), *overrides, AGAIN, timeout_s=100)[0]
    assert len(found["shrunk"]) == 2 and not found["delivered"] and found["bits"] == bits


def test_what_is_heard_of_a_sharded_model(ranks, tmp_path):
    given = ["batchnorm", 4, *BACKENDS["fsdp exact"]]
    plain = ranks(2, heard, str(tmp_path / "plain"), *given)
    assert ranks(2, heard, str(tmp_path / "again"), *given, AGAIN) == plain


@pytest.mark.parametrize(
    ("net", "control", "twice"),
    [
        ("transformer", "quantization.fake_quant", "'counts'"),
        ("transformer", "pruning.inputs", "'inputs'"),
        ("transformer", "pruning.hearing", "'activations'"),
        ("batchnorm", "pruning.outputs", "'outputs'"),
    ],
)
def test_what_is_counted_is_counted_once_and_twice_would_be_seen(tmp_path, net, control, twice):
    bits = heard(str(tmp_path / "plain"), net, 4)
    assert heard(str(tmp_path / "again"), net, 4, AGAIN) == bits
    with deaf(control):
        other = heard(str(tmp_path / "control"), net, 4, AGAIN)
    changed = [name for name in bits if other[name] != bits[name]]
    assert changed and all(twice in name for name in changed)


def test_batchnorm_is_recorded_once_and_its_classes_are_undone():
    records = []
    for classes, control in (([], None), (["Sequential"], None), (["Sequential"], "training.batchnorm")):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
        again, tracker = Recompute(classes), BatchNormTracker(net)
        again.put_on(net)
        tracker.begin_step()
        row = tracker.begin_micro(True)
        with deaf(control):
            net(torch.randn(2, 3, 8, 8)).square().sum().backward()
        again.take_off()
        assert not dressed(net)
        records.append(row)
    assert torch.equal(records[0], records[1]) and records[0][-1] == 1
    assert torch.equal(records[2], 2 * records[0])


def saved_bytes(net: nn.Module, x: torch.Tensor) -> int:
    """Of what is kept for the backward pass, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(storage.nbytes() for storage in kept.values())


def test_what_is_kept_for_the_backward_pass_is_smaller():
    net, x, again = Net(), torch.randn(32, 3, 8, 8), Recompute(["Block"])
    whole = saved_bytes(net, x)
    again.put_on(net)
    inputs = 2 * 32 * 8 * 16 * 4  # of the two blocks
    assert saved_bytes(net, x) + inputs < 0.4 * whole
    again.take_off()
    assert saved_bytes(net, x) == whole


class Drawn(nn.Module):
    """Draws from Python's own random numbers, too."""

    seen: list[bool]

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(4, 4), []

    def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        self.seen.append(recomputing())
        return nn.functional.dropout(self.inner(x) ** (1 + round(random.random() * 8)), 0.5) * scale


def test_random_numbers_are_drawn_again_and_those_behind_are_others():
    found = []
    for classes in ([], ["Drawn"]):
        torch.manual_seed(0)
        net, again = Drawn(), Recompute(classes)
        again.put_on(net)
        torch.manual_seed(1)
        random.seed(1)
        x = torch.rand(3, 4, requires_grad=True)
        y = net(x, scale=2.0)
        later = random.random(), torch.rand(2).tolist()
        y.sum().backward()
        assert x.grad is not None
        found.append((x.grad.tolist(), later, random.random()))
        assert net.seen == [False, True][: 1 + len(classes)] and not recomputing()
        with torch.no_grad():  # an evaluation keeps nothing
            net(x, scale=1.0)
        assert len(net.seen) == 2 + len(classes)
    assert found[0] == found[1]


def test_a_class_that_is_not_there_is_refused_on_every_rank_before_anything_runs(ranks, tmp_path):
    for said in ranks(2, refused, str(tmp_path)):
        assert said.startswith(
            "train.activation_checkpointing: no module of the model is a 'Blok'. There are Block, Call,"
        )


def refused(run_dir: str) -> str:
    try:
        job_of(run_dir, "transformer", "train.activation_checkpointing=[Blok]")
    except UserError as error:
        return str(error)
    return ""


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def test_a_head_that_is_left_out_for_a_fused_loss_is_itself_again():
    net, again = Headed(), Recompute(["Linear"])
    again.put_on(net)
    assert isinstance(call_headless(net, torch.randn(2, 4), "task.fused_head"), Headless)
    assert dressed(net) == ["head"]
    again.take_off()
    assert not dressed(net)
