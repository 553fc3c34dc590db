"""What a student learns from. A teacher answers a batch; it has no gradients, no optimizer and stays in eval mode.

Each rank asks it about its own samples only, with the very inputs, augmented, that the student saw; no logits cross
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from dist_compress.calling import Headless, call, call_headless, class_name, logits, output_layer
from dist_compress.compiling import Compiled
from dist_compress.layout import Layout, local_part
from dist_compress.parts import Parts

FUSED = "task.fused_head"  # the key by which hidden states are asked for
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(Protocol):
    model: nn.Module | None  # None: there is no network to look into

    def __call__(self, batch: dict[str, Any], headless: bool = False) -> Any:
        """What it says of a batch: an output of the model (`headless`: with logits that are not made), or a
        `stored.Stored`. Local, unless the teacher is sharded."""
        ...

    def note(self) -> str:
        """A line for the user."""
        ...


class OnlineTeacher:
    """A network that is asked: `model`, changed to `precision`, eval mode and no gradients. A replica on every rank, or
    sharded by `fully_shard` once it was in that precision."""

    def __init__(self, model: nn.Module, precision: str = "fp32", compiles: bool = False) -> None:
        """`compiles`: by torch.compile, where it is a replica."""
        self.dtype, self.precision = DTYPES[precision], precision
        self.layout = Layout(model)
        self.sharded = any(isinstance(p, DTensor) for p in model.parameters())
        if self.sharded:
            other = {p.dtype for p in model.parameters() if p.is_floating_point()} - {self.dtype}
            assert not other, f"shard the teacher once it is {self.dtype}: it is {other}"
        else:
            model = model.to(self.dtype)
        self.model: nn.Module | None = model.eval().requires_grad_(False)
        self.left_out = ", not compiled" if compiles and self.sharded else ""
        if compiles and not self.sharded:
            Compiled(self.model, "the teacher", trains=False)
        self.size = sum(p.numel() for p in model.parameters())
        self.rows: slice | None = None  # of the output layer, that are asked for
        self.told = ""

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], headless: bool = False) -> Any:
        """Collective if the model is sharded: every rank asks in every round, also with a dummy micro-batch."""
        assert self.model is not None and not self.model.training
        inputs = tree_map(self.cast, batch["inputs"])
        answer = call_headless(self.model, inputs, FUSED) if headless else call(self.model, inputs)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # else the root waits for a backward pass
        if self.rows is not None:
            found: Headless = logits(answer)
            found.weight = found.weight[self.rows].clone()
            found.bias = None if found.bias is None else found.bias[self.rows].clone()
        return answer

    def keep_rows(self, rows: slice) -> None:
        """Answer with these rows of the output layer alone, and free the others unless they are shared with another
        module, or sharded. Only hidden states are asked from then on. Local. Raises UserError."""
        assert self.model is not None
        head = output_layer(self.model, FUSED)
        whole, own = len(head.weight), len(range(len(head.weight))[rows])
        self.told = f", but for its output layer: {own:,} of {whole:,} rows here"
        if self.sharded:
            self.rows, self.told = rows, f"; {own:,} of {whole:,} rows of its output layer are used here"
            return
        holders = [m for m in self.model.modules() if any(p is head.weight for p in m._parameters.values())]
        kept = head.weight[rows]  # a view, where the input needs it whole
        if len(holders) > 1:
            self.told = "; its output layer is its input embedding and stays whole"
        head.weight = nn.Parameter(kept if len(holders) > 1 else kept.clone(), requires_grad=False)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias[rows].clone(), requires_grad=False)

    def cast(self, leaf: Any) -> Any:
        """Floating point numbers in the precision of the teacher."""
        return leaf.to(self.dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    def state(self) -> dict[str, torch.Tensor]:
        """The weights, whole on every rank. Collective if the model is sharded, one parameter after the other."""
        assert self.model is not None
        own = {name: self.layout.local(name) for name, _ in self.model.named_parameters(remove_duplicate=False)}
        parts = Parts.of(self.layout, own)
        return {name: parts.whole(name) if name in own else t for name, t in self.model.state_dict().items()}

    @torch.no_grad()
    def take(self, whole: Callable[[str], torch.Tensor]) -> None:
        """Set the weights, of which `whole(name)` are called in the same order on every rank. Local but for that."""
        assert self.model is not None
        own = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        for name, tensor in self.model.state_dict().items():
            value = whole(name)
            if name in own:
                tensor, value = self.layout.local(name), self.layout.part(name, value)
            tensor.copy_(value)

    def note(self) -> str:
        assert self.model is not None
        held = sum(local_part(p).numel() for p in self.model.parameters())
        where = f"sharded: {held:,} of them on this rank{self.left_out}" if self.sharded else "on every rank"
        name, told = class_name(self.model), f"{where}{self.told}"
        return f"teacher: {name} with {self.size:,} parameters in {self.precision}, {told}"
