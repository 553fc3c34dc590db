"""A network that only answers, a teacher, spread over the ranks by FSDP2, whichever backend trains the student.

Its units are gathered for their forward pass and freed after it; answers have the bits of a whole network.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_compress.backends.backend import Source
from dist_compress.backends.fsdp import Options, mesh, units
from dist_compress.backends.unsharding import Snapshot
from dist_compress.config import Config, merge


def spread_answering(model: nn.Module, config: Config, source: Source | None) -> None:
    """Let every rank hold rows of each parameter, on its device, in place: from here on every call of `model` is
    collective. Units, and groups of ranks that hold it once each, are those of `backend=fsdp`; with another backend
    the defaults of it. `source`: where weights come from if they are meta tensors in `model`; else they must be equal
    on every rank. Collective."""
    options = merge(Options, config.backend.options, "backend") if config.backend.name == "fsdp" else Options()
    types = {type(module).__name__ for module in model.modules()}
    options = replace(options, wrap=[name for name in options.wrap if name in types])  # they are the student's
    where = mesh(options.replicas)
    for unit in units(model, options):
        Snapshot(unit, model).fill(source)
        fully_shard(unit, mesh=where, reshard_after_forward=True)
