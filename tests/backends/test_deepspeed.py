"""ZeRO 0 to 3 against plain training in one process: masked at every step, sharded unevenly, accumulated, resumed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_compress import backends, comm
from dist_compress.backends import zero_library
from dist_compress.compose import parse
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.layout import local_part
from dist_compress.parts import Parts
from dist_compress.projection import Masked, Projection
from dist_compress.pruning.mask import put_on

pytest.importorskip("deepspeed", reason="NOT RUN deepspeed: pip install deepspeed --no-build-isolation")

NUM_MICRO, STEPS = 5, 4
STAGES = (0, 1, 2, 3)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """DeepSpeed's variables, which others take for torchrun's, are gone after each test of this process."""
    for name in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


class Mlp(nn.Module):
    """A tied layer, a layer that nothing uses, a frozen one; the smallest parameters are empty on a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3)
        self.again, self.idle, self.frozen = nn.Linear(9, 9), nn.Linear(2, 2), nn.Linear(9, 9)
        self.tied = nn.Linear(9, 9, bias=False)
        self.tied.weight = self.again.weight
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(self.again(self.norm(self.first(x)).tanh()))
        return self.last(self.frozen(x)) * self.scale


def model() -> nn.Module:
    torch.manual_seed(0)
    return Mlp()


def config(stage: int, **options: Any) -> Config:
    told = Config()
    told.backend.name, told.backend.options = "deepspeed", {"stage": stage, **options}
    told.train.global_batch_size, told.train.micro_batch_size = 4 * NUM_MICRO, 4
    told.train.exact = None
    return told


def inputs(step: int, micro: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + micro))


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output - 1.0).square().sum() / (4.0 * NUM_MICRO)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.03, weight_decay=0.1)


def keep(step: int, shape: torch.Size) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(step)) > 0.4


def plain(masked: bool = True) -> list[float]:
    """The losses of one process that has the latent and computes with the masked weight."""
    net, losses = model(), []
    optimizer, weight = adamw(net), net.first.weight  # type: ignore[union-attr]
    for p in net.idle.parameters():  # type: ignore[union-attr]
        p.grad = torch.zeros_like(p)  # ZeRO steps what no loss reaches
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        latent = weight.detach().clone()
        if masked:
            weight.data.mul_(keep(step, weight.shape))  # type: ignore[operator, arg-type]
        losses.append(0.0)
        for micro in range(NUM_MICRO):
            loss = loss_of(net(inputs(step, micro)))
            loss.backward()
            losses[-1] += loss.item()
        weight.data.copy_(latent)  # type: ignore[operator, arg-type]
        optimizer.step()
    return losses


def wrapped(net: nn.Module, told: Config) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    backend = backends.build(told)[1]
    module = backend.wrap(net)
    return backend, *backend.prepare(module, adamw(net))


def train(stage: int, masked: bool = True) -> list[float]:
    net, told = model(), config(stage)
    if comm.rank():
        nn.init.zeros_(net.first.weight)  # type: ignore[union-attr, arg-type]
    backend, module, optimizer = wrapped(net, told)
    projection = Projection(net, backend.layout)
    losses, rounds = [], -(-NUM_MICRO // comm.world_size())
    for step in range(STEPS):
        if masked:
            whole = keep(step, backend.layout.shape("first.weight"))
            projection.add("first.weight", "mask", Masked(backend.layout.part("first.weight", whole)))
        projection.project()
        optimizer.zero_grad()
        total = torch.zeros(1)
        for round in range(rounds):
            micro, last = round * comm.world_size() + comm.rank(), round == rounds - 1
            live = micro < NUM_MICRO
            with backend.sync_context(last):
                loss = loss_of(module(inputs(step, micro if live else 0)))
                backend.backward(loss * live, round, last)
            total += loss.detach() * live
        backend.finish_gradients()
        projection.restore(publish=False)
        backend.step(optimizer)
        losses.append(float(comm.all_reduce(total)))
    backend.release()
    return losses


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_one_process(ranks, stage):
    expected = plain()
    assert max(abs(a - b) for a, b in zip(expected, plain(masked=False), strict=True)) > 1e-2  # masks do matter
    for n in (1, 2, 3, 4):
        for losses in ranks(n, train, stage):
            assert losses == pytest.approx(expected, rel=1e-6), f"{n} ranks"


def accumulate(backend: Any, module: nn.Module) -> None:
    rounds = -(-NUM_MICRO // comm.world_size())
    for round in range(rounds):
        micro, last = round * comm.world_size() + comm.rank(), round == rounds - 1
        live = micro < NUM_MICRO
        with backend.sync_context(last), torch.autocast("cpu", torch.bfloat16, enabled=module.bf16):  # type: ignore
            backend.backward(loss_of(module(inputs(0, micro if live else 0)).float()) * live, round, last)
    backend.finish_gradients()


def gradients(stage: int, precision: str = "fp32", seen: bool = False) -> Any:
    """{parameter: whole gradient}, the norm, the same after clipping, and what the last layer computed in."""
    told, net = config(stage), model()
    told.train.precision = precision
    backend, module, _ = wrapped(net, told)
    module.bf16 = precision == "bf16"  # type: ignore[assignment]
    types = set()
    net.last.register_forward_hook(lambda m, args, out: types.add(str(out.dtype)))  # type: ignore[union-attr]
    accumulate(backend, module)
    found = whole_gradients(backend, net)
    norm = backend.clip(0.5)
    return found, norm, whole_gradients(backend, net), types


def whole_gradients(backend: Any, net: nn.Module) -> dict[str, torch.Tensor]:
    own = {n: g for n, _ in net.named_parameters() if (g := backend.layout.grad(n)) is not None}
    parts = Parts.of(backend.layout, own)
    return {name: parts.whole(name).clone() for name in own}


def plain_gradients() -> dict[str, torch.Tensor]:
    net = model()
    for micro in range(NUM_MICRO):
        loss_of(net(inputs(0, micro))).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_sums_and_are_clipped_as_one(ranks, stage):
    expected = plain_gradients()
    norm = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt().item()
    assert norm > 0.5
    for found, told, clipped, _ in ranks(3, gradients, stage):
        assert told == pytest.approx(norm, rel=1e-5) and found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(clipped[name], grad * 0.5 / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_computes_with_float32_parameters_and_sums(ranks, stage):
    expected = plain_gradients()
    for found, _, _, types in ranks(2, gradients, stage, "bf16"):
        assert types == {"torch.bfloat16"}
        for name, grad in expected.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - grad).norm() <= 0.03 * grad.norm(), name


def one_sided(stage: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs before, under and after a mask of which only the first rank holds something."""
    net = model()
    backend, module, _ = wrapped(net, config(stage))
    projection, name, outputs = Projection(net, backend.layout), "first.weight", []
    whole = torch.ones(backend.layout.shape(name), dtype=torch.bool)
    whole[0, 0] = False
    for mask in (None, whole, torch.ones_like(whole)):
        projection.restore()
        if mask is not None:
            put_on(projection, {name: backend.layout.part(name, mask)}, {})
        projection.project()
        with torch.no_grad():
            outputs.append(module(inputs(0, 0)))
        backend.rest()
    backend.release()
    return outputs[0], outputs[1], outputs[2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_mask_of_one_rank_reaches_all(ranks, stage):
    net = model()
    dense = net(inputs(0, 0)).detach()
    net.first.weight.data[0, 0] = 0.0  # type: ignore[union-attr, operator, index]
    masked = net(inputs(0, 0)).detach()
    assert not torch.allclose(dense, masked)
    for before, under, after in ranks(3, one_sided, stage):
        torch.testing.assert_close(before, dense)
        torch.testing.assert_close(under, masked)
        torch.testing.assert_close(after, dense)


def rows(stage: int) -> list[Any]:
    """Whether a parameter lies in rows in a checkpoint, whole and back; the empty fragments and rows there were."""
    net, before = model(), dict(model().named_parameters())
    backend, _, _ = wrapped(net, config(stage))
    layout, good, empty, blank = backend.layout, [], 0, []
    for name, value in before.items():
        local = layout.local(name).clone()
        saved = layout.wrapped(name, local)
        each = -(-value.shape[0] // comm.world_size())
        own = value[comm.rank() * each :][:each] if saved is not local else value
        good.append(torch.equal(local_part(saved), own) and saved.shape == value.shape)
        good.append(torch.equal(layout.unwrapped(name, saved), local))
        blank.append(layout.blank(name, torch.float32).shape == value.shape)
        empty += local.numel() == 0
    return [all(good), all(blank), empty]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints_hold_rows(ranks, stage):
    for n in (2, 4):
        found = ranks(n, rows, stage)
        assert all(good and blank for good, blank, _ in found)
        assert sum(empty for _, _, empty in found) > 0


def released(stage: int) -> Any:
    net = model()
    before = {module: (type(module), set(vars(module)), type(module._parameters)) for module in net.modules()}
    shapes = [(n, p.shape, p.requires_grad) for n, p in net.named_parameters()]
    backend, module, optimizer = wrapped(net, config(stage))
    module.bf16 = False  # type: ignore[assignment]
    accumulate(backend, module)
    backend.step(optimizer)
    backend.release()
    left = [m for m in net.modules() if before[m] != (type(m), set(vars(m)), type(m._parameters))]
    hooks = [h for m in net.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    same = shapes == [(n, p.shape, p.requires_grad) for n, p in net.named_parameters()]
    plain = all(type(p) is nn.Parameter and p.is_meta == (stage > 0) for p in net.parameters())
    return len(left), len(hooks), same, plain, net.tied.weight is net.again.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_partitioned_is_itself_again(ranks, stage):
    assert ranks(2, released, stage) == [(0, 0, True, True, True)] * 2


def compiled(folder: str) -> list[str]:
    """What DeepSpeed builds on first use."""
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    try:
        zero_library._joined = None
        linear = torch.nn.functional.linear
        wrapped(model(), config(3))
        return [*os.listdir(folder), *(["linear"] if torch.nn.functional.linear is not linear else [])]
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]


def test_nothing_is_compiled_and_torch_stays_as_it_is(ranks, tmp_path):
    assert ranks(2, compiled, str(tmp_path)) == [[], []]


def test_without_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'dist_compress\[deepspeed\]'"):
        zero_library.load()


def test_the_flag_of_its_launcher():
    with pytest.raises(UserError, match="--local_rank=1 is what DeepSpeed's launcher adds: give it --no_local_rank"):
        parse(["--local_rank=1", "+recipe=smoke"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": 4}, "backend.stage=4: no such stage of ZeRO. Available: 0, 1, 2, 3."),
        ({"reduce_bucket_size": 3}, "backend.reduce_bucket_size=3: must be an even number"),
        ({"config_file": "/none.json"}, "backend.config_file=/none.json: cannot be read"),
        ({"stages": 1}, "backend.stages: no such key"),
    ],
)
def test_refuses_options(options, said):
    with pytest.raises(UserError) as error:
        backends.build(config(**{"stage": 2, **options}))
    assert str(error.value).startswith(said)


def test_refuses_exact_sums_scalars_and_other_adagrads():
    told = config(2)
    told.train.exact = True
    with pytest.raises(UserError, match=r"^train.exact=true with backend=deepspeed"):
        backends.build(told)
    told.train.exact, told.optim.name = False, "Adagrad"
    with pytest.raises(UserError, match=r"^optim.name=Adagrad with backend.stage=2"):
        backends.build(told)
    told.optim.name, net = "AdamW", model()
    told.task.fused_head, told.backend.options["stage"] = True, 3
    with pytest.raises(UserError, match=r"^task.fused_head=true with backend.stage=3"):
        backends.build(told)
    told.task.fused_head, told.backend.options["stage"] = False, 2
    net.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="scale is a scalar"):
        backends.build(told)[1].check(net)


WRONG = {
    "zero_optimization.stage=3, but backend.stage is 2": {"zero_optimization": {"stage": 3}},
    "train_batch_size=24, but train.global_batch_size is 20": {"train_batch_size": 24},
    "train_micro_batch_size_per_gpu=2, but train.micro_batch_size is 4": {"train_micro_batch_size_per_gpu": 2},
    "gradient_accumulation_steps=3, but": {"gradient_accumulation_steps": 3},
    "gradient_clipping=1.0, but train.clip_norm is None": {"gradient_clipping": 1.0},
    "torch_autocast.dtype=bf16, but train.precision is fp32": {"torch_autocast": {"enabled": True}},
    'optimizer={"type": "Adam"}: optim.* decides': {"optimizer": {"type": "Adam"}},
    "scheduler=": {"scheduler": {"type": "WarmupLR"}},
    "fp16.enabled=true: what is compressed are float32": {"fp16": {"enabled": True}},
    "bf16.enabled=true: what is compressed are float32": {"bf16": {"enabled": True}},
    "zero_optimization.offload_param=": {"zero_optimization": {"offload_param": {"device": "nvme"}}},
    "zero_optimization.offload_optimizer=": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    "zero_optimization.zero_hpz_partition_size=2": {"zero_optimization": {"zero_hpz_partition_size": 2}},
    "zero_optimization.mics_shard_size=2": {"zero_optimization": {"mics_shard_size": 2}},
    "zero_optimization.stage3_param_persistence_threshold=9": {
        "zero_optimization": {"stage3_param_persistence_threshold": 9}
    },
    "zero_optimization.zenflow=": {"zero_optimization": {"zenflow": {}}},
    "pipeline=": {"pipeline": {"stages": 2}},
    "moe=": {"moe": {"enabled": True}},
}


@pytest.mark.parametrize("said", WRONG)
def test_refuses_a_file_that_says_something_else(tmp_path: Path, said: str):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(WRONG[said]))
    with pytest.raises(UserError) as error:
        backends.build(config(2, config_file=str(path)))
    assert f"backend.config_file={path}: {said}" in str(error.value)


def test_a_file_that_agrees_is_used(ranks, tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 2, "reduce_bucket_size": 64, "allgather_bucket_size": "auto", "contiguous_gradients": False}
    path.write_text(
        json.dumps({"train_batch_size": 20, "gradient_accumulation_steps": "auto", "zero_optimization": zero})
    )
    assert ranks(2, used, str(path)) == [64, 64]


def used(path: str) -> int:
    backend, module, _ = wrapped(model(), config(2, config_file=path))
    module.bf16 = False  # type: ignore[assignment]
    accumulate(backend, module)
    return backend.engine.optimizer.reduce_bucket_size
