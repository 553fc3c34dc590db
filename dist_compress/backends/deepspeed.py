"""DeepSpeed: ZeRO shards the state of the optimizer (`stage` 1), gradients too (2), weights too (3); 0 shards nothing.

ZeRO steps flat float32 partitions. They are what is compressed: a rank holds of each parameter what falls into its
partition, maybe nothing. The model computes with the partition itself (stage 3) or with a copy (1 and 2), to which
`layout.publish` brings a projection in one flat all-gather. Optimizer, schedule and clipping are ours.

On one rank there is nothing to shard: that of data parallel is used.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.backends import zero_config, zero_library
from dist_compress.backends.backend import Source
from dist_compress.backends.ddp import Ddp, spread
from dist_compress.backends.unsharding import Snapshot
from dist_compress.backends.zero_partitions import ParameterPartitions, Partitions
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.layout import Layout
from dist_compress.moments import Names, State


@dataclass
class Options:
    stage: int = 3  # of ZeRO: 1, 2, 3; 0: data parallel
    reduce_bucket_size: int = 50_000_000  # elements of gradients that are summed at once
    allgather_bucket_size: int = 500_000_000  # elements of weights that are gathered at once (stages 1 and 2)
    prefetch_bucket_size: int = 50_000_000  # elements of weights that are gathered ahead (stage 3)
    overlap_comm: bool = False  # sum gradients while others are computed
    config_file: str | None = None  # a configuration of DeepSpeed's (JSON), which has to agree with this one


class DeepSpeed(Ddp):
    def __init__(self, config: Config, options: Options) -> None:
        super().__init__(config, options)
        if options.stage not in (0, 1, 2, 3):
            raise UserError(f"backend.stage={options.stage}: no such stage of ZeRO. Available: 0, 1, 2, 3.")
        if self.exact:
            raise UserError(
                "train.exact=true with backend=deepspeed: DeepSpeed sums gradients in an order that depends on the "
                "number of ranks. Set train.exact=false, or choose backend=ddp or backend=fsdp."
            )
        for key in ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"):
            if getattr(options, key) < 2 or getattr(options, key) % 2:
                raise UserError(f"backend.{key}={getattr(options, key)}: must be an even number of elements.")
        if options.stage and config.optim.name == "Adagrad":
            raise UserError(
                f"optim.name=Adagrad with backend.stage={options.stage}: DeepSpeed makes another Adagrad of it, "
                "without its groups. Choose another optimizer, or backend.stage=0."
            )
        if options.stage == 3 and config.task.fused_head:
            raise UserError(
                "task.fused_head=true with backend.stage=3: ZeRO-3 lets go of the output layer before the loss is "
                "made. Set task.fused_head=false, backend.stage=2, or choose backend=fsdp."
            )
        self.told = zero_config.compose(config, options, comm.world_size())
        self.used = comm.is_initialized()
        self.sharded = self.used and options.stage > 0
        self.library: Any = zero_library.load() if self.used else None
        self.partitions: Any = None  # while the model is wrapped, and sharded

    @classmethod
    def can_be_exact(cls, options: Options) -> bool:
        return False

    def check(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 0:
                raise UserError(
                    f"backend=deepspeed: {name} is a scalar, which DeepSpeed cannot send. Give it the shape [1], or "
                    "choose backend=ddp."
                )
            if self.sharded and parameter.dtype != torch.float32:
                raise UserError(
                    f"backend.stage={self.options.stage}: {name} is {parameter.dtype}; what ZeRO steps must be "
                    "float32. Call model.float(), and set train.precision=bf16 to compute in bfloat16."
                )

    def wrap(self, model: nn.Module, source: Source | None = None, whole: Collection[str] = ()) -> nn.Module:
        if not self.used:
            return super().wrap(model, source, whole)
        self.check(model)
        if self.sharded and whole:
            raise UserError(
                f"backend.stage={self.options.stage}: {next(iter(whole))} is learned and whole on every rank, which "
                "ZeRO cannot leave so. Choose a method of quantization without learned scales (qat), or backend=fsdp."
            )
        self.model = model
        self.dress(model)
        if source is None:
            spread(model)
        self.snapshot = Snapshot(model, model, owner="deepspeed")
        self.snapshot.fill(source, self._partition if self.options.stage == 3 else None)
        return model

    def _partition(self, parameter: nn.Parameter) -> None:
        """Cut a whole parameter into a piece a rank: at once, so that no more than one is whole. Collective."""
        holder = nn.Module()
        holder.whole = parameter
        self.library.zero.Init(module=holder, config_dict_or_path=self.told, dtype=torch.float32)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        if not self.used:
            return module, optimizer
        assert self.model is not None
        self.engine = self.library.initialize(
            model=self.model, optimizer=optimizer, config=self.told, dist_init_required=False
        )[0]
        self.snapshot.taken()
        if self.sharded:
            kind = ParameterPartitions if self.options.stage == 3 else Partitions
            self.partitions = kind(self.engine.optimizer, self.model)
            self.layout = self.partitions.layout
        else:
            self.layout = Layout(self.model)
        return _Called(self.model, self.engine), self.engine.optimizer

    def release(self) -> None:
        self.undress()
        if not self.used:
            return
        self.engine.destroy()
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        if self.sharded:
            zero_library.forget(self.unwrap())
            self.snapshot.restore()
        self.partitions = None
        del self.engine

    def graphs(self, model: nn.Module) -> list[nn.Module]:
        if self.used and self.options.stage == 3:
            raise UserError(
                "train.compile=true with backend.stage=3: ZeRO-3 gathers weights inside of what would be a graph. Set "
                "train.compile=false, backend.stage=2, or choose backend=fsdp."
            )
        return super().graphs(model)

    def rest(self) -> None:
        if self.partitions is not None:
            self.partitions.rest()

    def sync_context(self, last: bool) -> AbstractContextManager[None]:
        if self.used:
            self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor, round: int, last: bool) -> None:
        if self.used:
            times = 1 if zero_config.sums(self.options) else comm.world_size()
            self.engine.backward(loss * times, scale_wrt_gas=False)
        else:
            super().backward(loss, round, last)

    def finish_gradients(self) -> None:
        if self.sharded:
            self.partitions.take_gradients()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises UserError where DeepSpeed would leave out a step, because gradients are not finite."""
        if not self.used:
            super().step(optimizer)
            return
        self.engine.step()
        if not self.engine.was_step_applied():
            raise UserError(
                "Gradients are not finite. Lower optim.lr, add a warm-up (optim.warmup=0.1) or set "
                "train.clip_norm=1.0. Checkpoints written before are untouched."
            )
        if self.sharded:
            self.partitions.drop_gradients()

    def moments(self, optimizer: torch.optim.Optimizer, names: Names) -> State:
        return self.partitions.moments() if self.sharded else super().moments(optimizer, names)

    def load_moments(self, optimizer: torch.optim.Optimizer, names: Names, state: State) -> None:
        if self.sharded:
            self.partitions.load_moments(state)
        else:
            super().load_moments(optimizer, names, state)


class _Called(nn.Module):
    """The model, called through its engine."""

    def __init__(self, model: nn.Module, engine: Any) -> None:
        super().__init__()
        self.module = model  # the name by which what is inside of a wrapper is found
        self.__dict__["engine"] = engine  # no child: it is a module around the same model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        engine: Any = self.engine
        return engine(*args, **kwargs)
