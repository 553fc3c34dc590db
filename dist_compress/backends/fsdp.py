"""Fully sharded data parallel (FSDP2): every rank holds rows of each parameter, its gradient and its moments.

Units are gathered for their forward and their backward pass. `wrap` names the classes of modules that become units
(blocks of a transformer), beside the root; without, the `_no_split_modules` of Hugging Face models, else the smallest
modules with `min_params` parameters. With `replicas` > 1 the ranks form that many groups, each holding the model once
(HSDP): gathers stay inside a group.

Exact (`train.exact`): gradients are reduced at every micro-batch and folded into float64 sums in the order of
micro-batches, so that the weights have the bits that DDP gives them, at any number of ranks. But where the input of a
unit is also used outside of it, its gradients are added in another order: a block should be one unit, not its norm.

On one rank there is nothing to shard: that of data parallel is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dist_compress import comm
from dist_compress.backends.backend import Source
from dist_compress.backends.ddp import Ddp, spread
from dist_compress.backends.ordered import OrderedGradients
from dist_compress.backends.unsharding import Snapshot
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.layout import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Options:
    wrap: list[str] = field(default_factory=list)  # class names of the modules that are gathered as one; []: see above
    min_params: int = 1_000_000  # of a unit that is found by its size
    reshard_after_forward: bool = True  # False: gathered once for forward and backward; more memory, less traffic
    param_dtype: str = "fp32"  # or bf16: what is gathered and computed with; what is stored and stepped stays fp32
    replicas: int = 1  # groups of ranks that hold the model once each


class Fsdp(Ddp):
    def __init__(self, config: Config, options: Options) -> None:
        super().__init__(config, options)
        if options.param_dtype not in DTYPES:
            raise UserError(f"backend.param_dtype={options.param_dtype!r}: no such choice. Available: fp32, bf16.")
        if options.min_params < 1:
            raise UserError(f"backend.min_params={options.min_params}: must be at least 1.")
        size, replicas = comm.world_size(), options.replicas
        if replicas < 1 or size % replicas:
            raise UserError(
                f"backend.replicas={replicas}: the {size} ranks must form that many groups of equal size. Choose a "
                "divisor of their number; 1 shards over all of them."
            )
        if self.exact and replicas > 1:
            raise UserError(
                f"train.exact=true with backend.replicas={replicas}: gradients of replicas are summed in an order that "
                "depends on their number. Set train.exact=false, or backend.replicas=1."
            )
        self.sharded = comm.is_initialized()
        if options.param_dtype != "fp32" and not self.sharded:
            raise UserError(
                f"backend.param_dtype={options.param_dtype}: there is one rank, so nothing is gathered. Set "
                "train.precision=bf16 to compute in bfloat16, or start more ranks."
            )
        self.sums: dict[FSDPModule, _ExactSum] = {}
        self.snapshots: list[Snapshot] = []

    @classmethod
    def can_be_exact(cls, options: Options) -> bool:
        return options.replicas == 1

    def check(self, model: nn.Module) -> None:
        norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if self.options.param_dtype != "fp32" and norms:
            raise UserError(
                f"backend.param_dtype={self.options.param_dtype}: {norms[0]} is a BatchNorm, whose statistics are "
                "float32 while its inputs would not be. Set backend.param_dtype=fp32 and train.precision=bf16, which "
                "computes in bfloat16 where that is safe."
            )
        types = {type(module).__name__ for module in model.modules()}
        if unknown := [name for name in self.options.wrap if name not in types]:
            raise UserError(
                f"backend.wrap: no module of the model is a {unknown[0]!r}. There are {', '.join(sorted(types))}."
            )

    def wrap(self, model: nn.Module, source: Source | None = None, whole: Collection[str] = ()) -> nn.Module:
        self.check(model)
        if not self.sharded:
            return super().wrap(model, source, whole)
        self.model = model
        self.dress(model)
        if source is None:
            spread(model)
        dtype = DTYPES[self.options.param_dtype]
        policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
        kept = dict.fromkeys(model.get_parameter(name) for name in whole)
        self.ordered = OrderedGradients([p for p in kept if p.requires_grad], self.num_micro)
        how: dict[str, Any] = {"reshard_after_forward": self.options.reshard_after_forward, "mp_policy": policy}
        how["mesh"] = mesh(self.options.replicas)
        self.snapshots = []
        for unit in units(model, self.options):
            snapshot = Snapshot(unit, model, kept)
            snapshot.fill(source)
            fully_shard(unit, ignored_params=set(kept), **how)
            snapshot.taken()
            self.snapshots.append(snapshot)
        self.sums = {}
        for module in self._units():
            module.set_gradient_divide_factor(1.0)  # losses are divided by the global count already
            module.set_force_sum_reduction_for_comms(True)
            if self.exact:
                self.sums[module] = _ExactSum()
                module.set_custom_reduce_scatter(self.sums[module])  # type: ignore[arg-type]
        self.layout = Layout(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad and p not in kept]
        return model

    def release(self) -> None:
        self.undress()
        for snapshot in reversed(self.snapshots):
            snapshot.restore()
        self.snapshots = []

    def graphs(self, model: nn.Module) -> list[nn.Module]:
        """Units with no other ones inside: nothing is gathered within a graph."""
        found = units(model, self.options)
        return [unit for unit in found if not any(m in found for m in unit.modules() if m is not unit)]

    def rest(self) -> None:
        for module in self._units():
            module.reshard()

    def sync_context(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.sharded else super().sync_context(last)

    def backward(self, loss: torch.Tensor, round: int, last: bool) -> None:
        """Gradients are reduced in every round: accumulated before, they would be whole on every rank."""
        if not self.sharded:
            super().backward(loss, round, last)
            return
        num_live = min(comm.world_size(), self.num_micro - round * comm.world_size())
        for total in self.sums.values():
            total.begin(num_live, first=round == 0)
        before = [p.grad for p in self.parameters] if self.exact else []
        if self.exact:  # what is reduced now is the sum so far
            for parameter in self.parameters:
                parameter.grad = None
        loss.backward()
        for parameter, grad in zip(self.parameters if self.exact else (), before, strict=True):
            if parameter.grad is None:
                parameter.grad = grad
        self.ordered.take(round)
        self.rest()

    def finish_gradients(self) -> None:
        if self.sharded:
            self.ordered.finish()
        else:
            super().finish_gradients()

    def _units(self) -> Iterator[FSDPModule]:
        assert self.model is not None
        return (module for module in self.model.modules() if isinstance(module, FSDPModule))


class _ExactSum:
    """The reduction of one unit: a rank's share of the float64 sum over the micro-batches so far, in their order."""

    def __init__(self) -> None:
        self.total: comm.OrderedSum | None = None
        self.num_live = 0

    def begin(self, num_live: int, first: bool) -> None:
        """A round begins in which the first `num_live` ranks have a micro-batch."""
        self.num_live = num_live
        if first:
            self.total = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Collective. `input_tensor`: [world_size * width], the unit's gradients as each rank needs them."""
        if self.total is None:
            self.total = comm.OrderedSum(len(input_tensor), input_tensor.device)
        if self.total.size != len(input_tensor):
            raise UserError(
                "train.exact=true with backend=fsdp: the micro-batches of a step use different parameters of one unit. "
                "Set train.exact=false, or name smaller units in backend.wrap."
            )
        self.total.add(input_tensor[None], self.num_live)
        output_tensor.copy_(self.total.slice)


def mesh(replicas: int) -> DeviceMesh:
    """All ranks, in so many groups that hold a model once each. Collective."""
    size, kind = comm.world_size(), comm.device().type
    if replicas == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def units(model: nn.Module, options: Options) -> list[nn.Module]:
    """The modules that are gathered as one, inner ones first, the model itself last. Local, the same on every rank."""
    wanted = options.wrap or list(getattr(model, "_no_split_modules", None) or [])
    if wanted:
        found = [module for module in model.modules() if type(module).__name__ in wanted and module is not model]
    else:
        found = []
        _by_size(model, options.min_params, found)
    inner = [m for m in found if any(p.numel() for p in m.parameters())]
    return [*reversed([m for m in inner if m is not model]), model]


def _by_size(module: nn.Module, least: int, found: list[nn.Module]) -> int:
    """Appends the units inside `module`, outer ones first; returns how many parameters of it are in none."""
    inside: list[nn.Module] = []
    free = sum(p.numel() for p in module.parameters(recurse=False))
    free += sum(_by_size(child, least, inside) for child in module.children())
    if free >= least and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        found.append(module)
        free = 0
    found.extend(inside)
    return free
