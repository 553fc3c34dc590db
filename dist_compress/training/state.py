"""What a run resumes from, as checkpoints hold it: tensors in global coordinates, each rank's part written by itself.

A checkpoint of one layout is read into any other: whole, in rows (FSDP2) or in flat pieces (ZeRO). `trainer` is a
`loop.Trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.config import OptimConfig
from dist_compress.layout import Layout, local_part
from dist_compress.moments import State, Transform, each_moment, is_moment
from dist_compress.parts import Parts, join
from dist_compress.training import checkpoint
from dist_compress.training.optim import check_weights

Tensors = dict[str, torch.Tensor]


def of(trainer: Any) -> dict[str, Any]:
    """All that a run resumes from: the latent weights, moments, methods and the step. The same on every rank but for
    sharded weights and moments, of which each has its part. Collective."""
    layout = trainer.backend.layout
    with trainer.projection.lifted():
        model = weights(trainer.model, layout)
    optim = each_moment(trainer.backend.moments(trainer.optimizer, trainer.names), layout.wrapped)
    methods = [method.state_dict() for method in trainer.methods]
    return {"step": trainer.step, "model": model, "optim": optim, "methods": methods}


def load(trainer: Any, state: dict[str, Any]) -> None:
    """The inverse of `of`. Collective."""
    layout = trainer.backend.layout
    trainer.projection.restore()
    load_weights(trainer.model, layout, state["model"])
    trainer.backend.load_moments(trainer.optimizer, trainer.names, each_moment(state["optim"], layout.unwrapped))
    for method, saved in zip(trainer.methods, state["methods"], strict=True):
        method.load_state_dict(saved)
    trainer.step, trainer.settled = state["step"], True
    trainer.projection.project()


def write(trainer: Any) -> Path | None:
    """See `Trainer.save`. Collective."""
    config = trainer.config
    if config.run_dir is None:
        return None
    state = of(trainer)
    check_finite(state["model"], trainer.step, config.optim, trainer.backend.sharded)
    meta = {"phase": trainer.phase, "config": asdict(config), "world_size": comm.world_size()}
    return checkpoint.save(Path(config.run_dir), trainer.step, state, meta, config.checkpoint.keep)


def resume(trainer: Any, folder: Path) -> None:
    """See `Trainer.resume`. Collective. Raises UserError."""
    checkpoint.check_config(folder, checkpoint.read_meta(folder)["config"], trainer.config)
    model, layout = trainer.model, trainer.backend.layout
    state = checkpoint.load(folder, lambda path, size, dtype: blank(path, size, dtype, model, layout))
    checkpoint.check_model(folder, state["model"], shapes(model, layout))
    load(trainer, state)


def weights(model: nn.Module, layout: Layout) -> Tensors:
    """The state of `model`: parameters as `layout.wrapped` has them, and buffers; copies. Collective only if a layout
    has to move elements for that."""
    own = _parameters(model)
    return {
        name: layout.wrapped(name, layout.local(name).clone()) if name in own else tensor.detach().clone()
        for name, tensor in model.state_dict().items()
    }


@torch.no_grad()
def load_weights(model: nn.Module, layout: Layout, saved: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `weights`, for a state of which `checkpoint.check_model` has seen that it has all names."""
    own = _parameters(model)
    for name in own:
        layout.local(name).copy_(layout.unwrapped(name, saved[name]))
    layout.publish()
    model.load_state_dict({name: value for name, value in saved.items() if name not in own}, strict=False)


def blank(path: str, size: torch.Size, dtype: torch.dtype, model: nn.Module, layout: Layout) -> torch.Tensor:
    """What the tensor under `path` of a checkpoint is read into: of a weight or a moment no more than this rank holds.
    Local."""
    _, kind, name, *_ = [*path.split("/"), "", ""]
    if kind in ("model", "optim") and name in _parameters(model) and size == layout.shape(name):
        return layout.blank(name, dtype)
    return torch.empty(size, dtype=dtype)


def shapes(model: nn.Module, layout: Layout) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of what `weights` gives. Local."""
    own = _parameters(model)
    return [(n, tuple(layout.shape(n) if n in own else t.shape)) for n, t in model.state_dict().items()]


def resharded(state: State, before: Parts, transform: Transform, layout: Layout) -> State:
    """The moments of a model that was shrunk, as this rank holds them from here on. Collective, one after the other.

    `before`: who held what of the parameters. `transform({name: whole tensor})` slices one as its parameter was.
    """
    keys = [f"{name}/{key}" for name, values in state.items() for key in values]
    comm.check_order("moments of the optimizer", keys)
    out: State = {name: {} for name in state}
    for name, values in state.items():
        for key, value in values.items():
            if not is_moment(value):
                out[name][key] = value
                continue
            if name in before.holdings:  # else of a method that was out of the model then: whole on every rank
                value = join(value, before.holdings[name], before.shapes[name])
            out[name][key] = layout.part(name, transform({name: value})[name]).clone()
    return out


def check_finite(saved: Mapping[str, torch.Tensor], step: int, config: OptimConfig, sharded: bool) -> None:
    """Raise UserError on every rank unless all weights are finite: a loss may be so when its gradients are not.
    Collective when `sharded`."""
    bad = next((n for n, t in saved.items() if t.is_floating_point() and not bool(local_part(t).isfinite().all())), "")
    found = comm.gather_object(bad) if sharded else [bad]
    check_weights(next((name for name in found if name), ""), step, config)


def _parameters(model: nn.Module) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False))
