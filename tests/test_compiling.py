"""Compiled runs: what is in a graph does what it does outside, nothing is left out in silence."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fused_runs import AGAIN, BACKENDS, heard, whole_run
from torch import nn

from dist_compress import compiling
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.recompute import Recompute

COMPILED = "train.compile=true"


@contextmanager
def traced() -> Iterator[None]:
    """Inside, graphs are recorded and differentiated as ever, but run by the kernels of torch, which have its bits."""
    with mock.patch("dist_compress.compiling.torch.compile", functools.partial(torch.compile, backend="aot_eager")):
        yield


def run_in_graphs(*args: Any) -> dict[str, Any]:
    with traced():
        return whole_run(*args)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_the_same_in_graphs_on_two_ranks(ranks, tmp_path):
    """Of units inside of others, before and after the shrink."""
    overrides = ["transformer", *BACKENDS["fsdp, units inside"], "distillation.config_list=[]"]
    bits = ranks(2, whole_run, str(tmp_path / "plain"), *overrides, timeout_s=110)[0]["bits"]
    found = ranks(2, run_in_graphs, str(tmp_path / "graphs"), *overrides, COMPILED, timeout_s=300)[0]
    assert found["shrunk"] and not found["delivered"] and found["bits"] == bits


def by_inductor(run_dir: str, *overrides: str) -> tuple[dict[str, str], list[float]]:
    """The bits that a run of a few steps holds, and its losses; random numbers are those of torch."""
    with torch._inductor.config.patch(fallback_random=True):
        bits = heard(run_dir, "transformer", 4, "distillation.config_list=[]", *overrides)
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return bits, [row["train/loss"] for row in rows if "train/loss" in row]


def refusal(run_dir: str, *overrides: str) -> str:
    try:
        heard(run_dir, "transformer", 1, "distillation.config_list=[]", COMPILED, *overrides)
    except UserError as error:
        return str(error)
    return ""


HEARS_GRADIENTS = (
    "pruning.config_list=[{op_types: [ReLU], target_names: [_output_], method: taylor, granularity: per_channel}]"
)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["backend=deepspeed", "backend.stage=3", "train.exact=false"],
            "train.compile=true with backend.stage=3: ZeRO-3",
        ),
        (
            ["backend=fsdp", "backend.wrap=[FusedAttention]", AGAIN],
            "blocks.0 would run again around it. Name the class",
        ),
        ([HEARS_GRADIENTS], "scores by the gradient of an activation, which train.compile=true leaves inside"),
    ],
    ids=["zero-3", "around a unit", "gradients"],
)
def test_what_is_no_graph_is_refused_on_every_rank(ranks, tmp_path, overrides, said):
    for found in ranks(2, refusal, str(tmp_path), *overrides):
        assert said in found


def test_a_machine_without_a_compiler_is_told_so_at_once(monkeypatch):
    config = Config()
    compiling.check(config, torch.device("cpu"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    compiling.check(config, torch.device("cuda"))
    with pytest.raises(UserError, match="needs a C.. compiler on a CPU, and there is no g.. or clang... Install one"):
        compiling.check(config, torch.device("cpu"))
    config.task.fused_head = True
    with pytest.raises(UserError, match="task.fused_head=true with train.compile=true: the output layer is left out"):
        compiling.check(config, torch.device("cuda"))


class Deciding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(x.sum() > 0) else x * 3


def test_a_forward_that_looks_at_values_is_refused_with_the_line_and_runs_where_nothing_is_compiled():
    net = nn.Sequential(nn.Linear(2, 2), Deciding())
    names = list(net.state_dict())
    with traced():
        (compiled,) = compiling.put_on(net, [net], Recompute([]))
    with pytest.raises(UserError, match=r"train.compile=true: the model cannot .*test_compiling.py.*Set train.compile"):
        net(torch.ones(1, 2))
    with torch.no_grad():
        net(torch.ones(1, 2))
    twin = copy.deepcopy(net)
    assert "Compiled" not in repr(twin.forward) and twin.forward.__self__ is twin
    assert twin(torch.ones(1, 2)).shape == (1, 2) and list(net.state_dict()) == names == list(twin.state_dict())
    compiled.remove()
    assert "forward" not in vars(net) and net(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fused_kernels_do_the_same_with_equal_bits_on_two_ranks(ranks, tmp_path):
    _, plain = ranks(1, by_inductor, str(tmp_path / "plain"))[0]
    bits, losses = ranks(1, by_inductor, str(tmp_path / "one"), COMPILED, timeout_s=400)[0]
    assert losses == pytest.approx(plain, rel=1e-6) and losses != plain  # other kernels, in bits as well
    assert ranks(2, by_inductor, str(tmp_path / "two"), COMPILED, timeout_s=400) == [(bits, losses)] * 2
