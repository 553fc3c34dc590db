"""torch.compile (`train.compile`): the forward passes of a model that train it, each as one graph.

A graph has no holes: what cannot be in it is refused, so nothing runs uncompiled in silence. It is made anew for every
shape and every state of what acts inside (before quantization begins, while ranges are observed, once they stay), and
after a shrink. Passes without gradients, in evaluations, calibrations and probes, are not compiled: they come in other
sizes, each of which would take as long to compile as the graph that trains. A teacher has no other ones: all of its
are.

Everything here is local.
"""

from __future__ import annotations

import copy
import importlib
import os
import shutil
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.forwards import Forward
from dist_compress.functions import Watched
from dist_compress.recompute import Recompute

KEY = "train.compile=true"
MOST_GRAPHS = 256  # of one forward: units of one class share its code


def check(config: Config, device: torch.device) -> None:
    """Raise UserError where nothing can be compiled, the same on every rank of alike machines."""
    if config.task.fused_head:
        raise UserError(
            f"task.fused_head=true with {KEY}: the output layer is left out while the model runs, which a graph cannot "
            "do. Set one of them to false."
        )
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, wanted)):
        raise UserError(
            f"{KEY}: torch.compile needs a C++ compiler on a CPU, and there is no {' or '.join(wanted)}. Install one "
            "(apt-get install g++), name it in the environment variable CXX, or set train.compile=false."
        )


def put_on(model: nn.Module, graphs: Sequence[nn.Module], recompute: Recompute) -> list[Compiled]:
    """Compile modules of `model`. Raises UserError for what runs again around one of them: between two graphs of one
    forward nothing makes sure that both keep the same."""
    names = {module: name for name, module in model.named_modules()}
    for forward in recompute.put:
        if inner := [m for m in forward.owner.modules() if m in graphs and m is not forward.owner]:
            raise UserError(
                f"train.activation_checkpointing={recompute.classes} with {KEY}: {names[inner[0]]} is compiled by "
                f"itself, and {names[forward.owner]} would run again around it. Name the class of the former, or that "
                "of the latter in backend.wrap."
            )
    return [Compiled(module, names[module]) for module in graphs]


class Compiled(Forward):
    """A forward that is compiled when it is first called."""

    def __init__(self, owner: nn.Module, name: str, trains: bool = True) -> None:
        """`name`: of the module, for messages; `trains`: passes without gradients run as they are."""
        super().__init__(owner)
        self.name, self.trains = name or "the model", trains
        config: Any = torch._dynamo.config  # imported when it is asked for: it takes seconds
        self.refusal: type[Exception] = importlib.import_module("torch._dynamo.exc").TorchDynamoException
        config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
        if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
            config.skip_fwd_side_effects_in_bwd_under_checkpoint = True  # what is counted, in a forward that runs again
        self.run = torch.compile(self.inner, fullgraph=True, dynamic=False)
        self.handles = [handle for watched in _watched(owner) for handle in watched.heed()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trains and not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        try:
            return self.run(*args, **kwargs)
        except self.refusal as error:
            raise UserError(
                f"{KEY}: {self.name} cannot be compiled as one graph. {_reason(error)} Set train.compile=false."
            ) from error

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        super().remove()

    def __deepcopy__(self, memo: Any) -> Any:
        """Copies are not compiled."""
        if self.previous is not None:
            return copy.deepcopy(self.previous, memo)
        return MethodType(type(self.owner).forward, copy.deepcopy(self.owner, memo))


def _watched(model: nn.Module) -> Iterator[Watched]:
    for module in model.modules():
        forward = vars(module).get("forward")
        while isinstance(forward, Forward):
            if isinstance(forward, Watched):
                yield forward
            forward = forward.previous


def _reason(error: Exception) -> str:
    """What torch says, without its hints, and the line of code it stumbled over."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("Explanation:")), lines[0] if lines else repr(error))
    files = [line for line in lines if line.startswith("File ")]
    return f"{said.removeprefix('Explanation: ').rstrip('.')}{f' ({files[-1]})' if files else ''}."
