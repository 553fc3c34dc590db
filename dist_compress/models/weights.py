"""Weights from a file into a model: safetensors, or a torch file of plain tensors (`weights_only`)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dist_compress.errors import UserError

_SHOWN = 8  # names of tensors that do not fit, of each way not to
_WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep the weights


def load_weights(model: nn.Module, path: str | Path, key: str = "model.weights") -> None:
    """Copies the tensors of `path` into `model`, in the model's dtypes and on its devices. Local.

    Every parameter and persistent buffer must be in the file with its shape, and nothing else; only
    `num_batches_tracked` and further names of tied tensors may be missing. A prefix "module." is dropped.
    Raises UserError that names `key` and the first keys that do not fit; the model is then unchanged.
    """
    state = _strip_prefix(read_weights(path, key))
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    found = {id(own[name]) for name in state if name in own}
    missing = [
        name
        for name, tensor in own.items()
        if name not in state and id(tensor) not in found and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} (file {list(state[name].shape)}, model {list(own[name].shape)})"
        for name in state
        if name in own and state[name].shape != own[name].shape
    ]
    refuse_unfit(
        f"{key}={str(path)!r} does not fit the model {type(model).__name__}",
        {"missing": missing, "unexpected": unexpected, "of another shape": misshapen},
        "Use weights of this architecture and class count, or unset the key to train from scratch.",
    )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def refuse_unfit(what: str, problems: Mapping[str, Sequence[str]], remedy: str) -> None:
    """Raise UserError unless there are no problems: {in which way tensors do not fit: their names}."""
    lines = []
    for way, names in problems.items():
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines += [f"  {len(names)} {way}: {', '.join(names[:_SHOWN])}{more}"] if names else []
    if lines:
        raise UserError("\n".join([f"{what}:", *lines, remedy]))


def read_weights(path: str | Path, key: str = "model.weights") -> dict[str, torch.Tensor]:
    """The tensors of a file by name, on the CPU. Local. Raises UserError for what cannot be read as such."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{key}={str(path)!r}: no such file. Give a .safetensors or a torch file of tensors.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}={str(path)!r}: holds more than tensors, or is damaged; it is not unpickled ({reason}). "
            "Save the state_dict alone, best as .safetensors."
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}={str(path)!r}: truncated, damaged or of another format ({str(error) or 'it ends too soon'}). Copy "
            "it again."
        ) from error
    return _tensors(content, path, key)


def _tensors(content: Any, path: Path, key: str) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"{key}={str(path)!r}: not a dictionary of tensors by name. Save model.state_dict().")
    return dict(content)


def _strip_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the "module." that DistributedDataParallel puts before every name."""
    prefix = "module."
    if state and all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
