"""Sharded gradients have the bits of whole ones; units; and a module that was sharded is itself again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_compress import backends, comm
from dist_compress.backends.fsdp import Options, units
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.layout import local_part
from dist_compress.parts import Parts, check_copies

NUM_MICRO = 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """With a tied layer, a parameter of one row, and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = Block(), Block(), nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.head.weight
        self.scale, self.idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(self.tied(x)))) * self.scale


def inputs(micro: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(micro)) * 10.0 ** (micro - 2)


def backend_of(name: str, exact: bool = True, **options: Any) -> Any:
    config = Config()
    config.train.exact, config.backend.name, config.backend.options = exact, name, options
    config.train.global_batch_size, config.train.micro_batch_size = 4 * NUM_MICRO, 4
    return backends.build(config)[1]


def step(backend: Any, module: nn.Module) -> None:
    rounds = -(-NUM_MICRO // comm.world_size())
    for round in range(rounds):
        micro = round * comm.world_size() + comm.rank()
        live = micro < NUM_MICRO
        loss = module(inputs(micro if live else 0)).square().sum() / 20.0 * live
        backend.backward(loss, round, round == rounds - 1)
    backend.finish_gradients()


def whole_gradients(backend: Any) -> list[torch.Tensor | None]:
    names = [name for name, _ in backend.unwrap().named_parameters()]
    grads = {name: grad for name in names if (grad := backend.layout.grad(name)) is not None}
    parts = Parts.of(backend.layout, grads)
    return [parts.whole(name).clone() if name in grads else None for name in names]


def gradients(name: str, exact: bool = True, **options: Any) -> tuple[Any, float]:
    backend = backend_of(name, exact, **options)
    step(backend, backend.wrap(Net()))
    grads = whole_gradients(backend)
    return grads, backend.clip(0.5)


def fsdp_gradients(options: dict[str, Any]) -> tuple[Any, float]:
    return gradients("fsdp", **options)


def same(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", [{"wrap": ["Block"]}, {"min_params": 40, "reshard_after_forward": False}])
def test_exact_gradients_and_their_norm_have_the_bits_of_one_rank(ranks, options):
    expected, norm = ranks(1, gradients, "ddp")[0]
    assert sum(grad is None for grad in expected) == 1
    for n in (1, 2, 3, 4):
        for grads, found in ranks(n, fsdp_gradients, options):
            assert same(grads, expected) and found == norm, n


@pytest.mark.parametrize("options", [{"wrap": ["Block"], "exact": False}, {"replicas": 2, "exact": False}])
def test_plain_gradients_are_close_but_have_other_bits(ranks, options):
    expected, norm = ranks(1, gradients, "ddp")[0]
    for grads, found in ranks(4, fsdp_gradients, options):
        assert not same(grads, expected) and found == pytest.approx(norm, rel=1e-5)
        for grad, right in zip(grads, expected, strict=True):
            assert grad is right or (grad - right).abs().max() <= 1e-5 * right.abs().max()


def wrapped_again(sizes: tuple[int, int]) -> tuple[bool, list[str], list[str], Any, Any, Any]:
    """Sharded, trained a step, released, its hidden layers cut to other sizes, sharded again, trained a step."""
    net, heard = Net(), []
    net.a.register_forward_hook(lambda *_: heard.append("a"))
    kinds, before = [type(m) for m in net.modules()], {m: sorted(vars(m)) for m in net.modules()}
    backend = backend_of("fsdp", wrap=["Block"])
    step(backend, backend.wrap(net))
    parts = Parts.of(backend.layout, {n: backend.layout.local(n) for n, _ in net.named_parameters()})
    grads = whole_gradients(backend)
    backend.rest()
    backend.release()
    plain = (
        all(type(p) is nn.Parameter and p.is_meta for p in net.parameters()) and [*map(type, net.modules())] == kinds
    )
    plain = plain and all(sorted(vars(m)) == names for m, names in before.items()) and net.calls.device.type == "cpu"
    hooks = [str(h) for m in net.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    for block, size in zip((net.a, net.b), sizes, strict=True):
        block.up.weight = nn.Parameter(torch.empty(size, 6, device="meta"))
        block.up.bias = nn.Parameter(torch.empty(size, device="meta"))
        block.down.weight = nn.Parameter(torch.empty(6, size, device="meta"))

    def source(name: str) -> torch.Tensor:
        value, shape = parts.whole(name), net.get_parameter(name).shape
        return value[tuple(slice(0, n) for n in shape)].contiguous()

    backend = backend_of("fsdp", wrap=["Block"])
    step(backend, backend.wrap(net, source))
    tied = net.tied.weight is net.head.weight and isinstance(net.tied.weight, DTensor)
    return plain and tied, hooks, heard, grads, whole_gradients(backend), [type(m).__name__ for m in net.modules()]


def cut_alone(sizes: tuple[int, int]) -> Any:
    net = Net()
    for block, size in zip((net.a, net.b), sizes, strict=True):
        up, down = block.up, block.down
        up.weight, up.bias = nn.Parameter(up.weight[:size].detach()), nn.Parameter(up.bias[:size].detach())
        down.weight = nn.Parameter(down.weight[:, :size].detach().contiguous())
    backend = backend_of("ddp")
    step(backend, backend.wrap(net))
    return whole_gradients(backend)


@pytest.mark.parametrize("sizes", [(4, 7), (1, 9)])  # fewer rows than ranks
def test_what_was_sharded_is_itself_again_and_can_be_sharded_in_other_sizes(ranks, sizes):
    expected, cut = ranks(1, gradients, "ddp")[0][0], ranks(1, cut_alone, sizes)[0]
    for n in (2, 4):
        for plain, hooks, heard, grads, again, names in ranks(n, wrapped_again, sizes):
            assert plain and len(hooks) == 1 and "lambda" in hooks[0] and set(heard) == {"a"}
            assert same(grads, expected) and same(again, cut)
            assert names.count("FSDPBlock") == 2 and names[0] == "FSDPNet"


def memory_after_a_forward(reshard: bool) -> tuple[int, int]:
    """Elements of parameters that this rank holds after forward, while sharded and in all."""
    backend = backend_of("fsdp", wrap=["Block"], reshard_after_forward=reshard)
    net = backend.wrap(Net())
    net(inputs(0))
    inner = [m for m in net.modules() if isinstance(m, FSDPModule) and m is not net]
    held = sum(local_part(p).numel() for m in inner for p in m.parameters())
    return held, sum(p.numel() for m in inner for p in m.parameters())


def test_units_are_freed_after_their_forward_pass_unless_asked_otherwise(ranks):
    held = ranks(2, memory_after_a_forward, True)
    assert sum(h for h, _ in held) == held[0][1]
    assert all(h == total for h, total in ranks(2, memory_after_a_forward, False))


def test_units_by_class_by_size_and_as_the_model_names_them():
    net = Net()
    assert units(net, Options(wrap=["Block"])) == [net.b, net.a, net]
    assert units(net, Options(min_params=61))[-1] is net  # 60 parameters of `down` are left to the block with its norm
    assert set(units(net, Options(min_params=61))) == {net.a.up, net.b.up, net.a, net.b, net}
    net._no_split_modules = ["LayerNorm"]  # type: ignore[assignment]
    assert units(net, Options()) == [net.b.norm, net.a.norm, net]


def refused(options: dict[str, Any], exact: bool = False, net: nn.Module | None = None) -> str:
    try:
        backend_of("fsdp", exact, **options).check(net or Net())
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "exact", "said"),
    [
        ({"replicas": 2}, False, "backend.replicas=2: the 3 ranks must form that many groups of equal size."),
        ({"replicas": 3}, True, "train.exact=true with backend.replicas=3"),
        ({"param_dtype": "fp16"}, False, "backend.param_dtype='fp16': no such choice. Available: fp32, bf16."),
        ({"min_params": 0}, False, "backend.min_params=0: must be at least 1."),
        ({"wrap": ["Blok"]}, False, "backend.wrap: no module of the model is a 'Blok'. There are Block, LayerNorm"),
        ({"wrapp": []}, False, "backend.wrapp: no such key"),
    ],
)
def test_refuses(ranks, options, exact, said):
    for found in ranks(3, refused, options, exact):
        assert found.startswith(said)


def test_one_rank_gathers_nothing(ranks):
    said = ranks(1, refused, {"param_dtype": "bf16"})[0]
    assert "there is one rank, so nothing is gathered. Set train.precision=bf16" in said
    assert "backend.wrap: no module" in ranks(1, refused, {"wrap": ["Blok"]})[0]


def replicas_compared(drift: bool) -> str:
    backend = backend_of("fsdp", False, replicas=2)
    net = backend.wrap(Net())
    if drift and comm.rank() == 3:
        local_part(net.head.weight.detach()).view(-1)[0] += 1e-6
    try:
        check_copies(backend.layout, [name for name, _ in net.named_parameters()], 7)
    except RuntimeError as error:
        return str(error)
    return ""


def test_replicas_that_drifted_are_found(ranks):
    assert ranks(4, replicas_compared, False) == [""] * 4
    for said in ranks(4, replicas_compared, True):
        assert said.startswith("Ranks 1 and 3 hold the same parts of the weights with other bits at step 7")


def test_batchnorm_under_bfloat16_parameters_is_refused(ranks):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert "1 is a BatchNorm" in ranks(2, refused, {"param_dtype": "bf16"}, False, net)[0]


def in_bfloat16() -> tuple[torch.dtype, bool, float]:
    backend = backend_of("fsdp", False, wrap=["Block"], param_dtype="bf16")
    module = backend.wrap(Net())
    seen = []
    module.b.up.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    step(backend, module)
    whole = whole_gradients(backend)
    return seen[0], all(g is None or g.dtype == torch.float32 for g in whole), backend.clip(1e9)


def test_bfloat16_computes_with_copies_of_float32_parameters(ranks):
    norm = ranks(1, gradients, "ddp")[0][1]
    for dtype, kept, found in ranks(2, in_bfloat16):
        assert dtype == torch.bfloat16 and kept and found == pytest.approx(norm, rel=0.02)
