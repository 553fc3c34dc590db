"""What a valid config list must mask of activations, said a second time: plain numpy over what the modules held.

Every module of the net takes and returns one tensor, with its channels in dim 1.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
from pruning_nets import NUM_MICRO, Net
from torch import nn

Entry = dict[str, Any]
LIVE = (0, 4)  # the micro-batches in which anything is heard


def batch(micro: int) -> torch.Tensor:
    """Of the one step that is heard."""
    return torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(77 + micro))


def sides(name: str) -> str:
    """The one tensor that a name of a target means."""
    return "_input_0" if name.startswith("_input_") else "_output_0"


def is_activation(name: str) -> bool:
    return "_input_" in name or "_output_" in name


@functools.cache
def held() -> dict[str, dict[str, np.ndarray]]:
    """{path: {method: what each number behind the samples adds to the score}}, means over the micro-batches."""
    model, found = Net().train(), {}

    def add(path: str, tensor: torch.Tensor) -> None:
        a = tensor.detach().double().numpy()
        own = found.setdefault(path, {"l1_norm": 0.0, "l2_norm": 0.0})
        own["l1_norm"] = own["l1_norm"] + np.abs(a).sum(0) / NUM_MICRO
        own["l2_norm"] = own["l2_norm"] + (a**2).sum(0) / NUM_MICRO

    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _, args, out, name=name: (add(f"{name}._input_0", args[0]), add(f"{name}._output_0", out), None)[2]
        )
    for micro in LIVE:
        model(batch(micro))
    return found


def asked_of(entry: Entry, name: str) -> dict[str, list[Entry]]:
    """{path: [what is asked of it, the later the stronger]} of the activations of module `name` in an entry."""
    settings = {t: s for t, s in entry.get("target_settings", {}).items() if is_activation(t)}
    named = entry.get("target_names", list(settings))
    found = {}
    for side in dict.fromkeys(sides(t) for t in named if is_activation(t)):
        path = f"{name}.{side}"
        if path in held():
            own = sorted((t for t in settings if sides(t) == side), key=lambda t: not t.endswith("_"))
            found[path] = [settings[t] for t in own]
    return found


def regions(s: Entry, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The numbers of each unit, behind the samples."""
    kind = s.get("granularity") or "per_channel"
    if kind in ("default", "per_channel"):
        cut = [1, *shape[1:]]
    elif kind == "element":
        cut = [1] * len(shape)
    else:
        kernel, mode, pad = kind if isinstance(kind[0], list) else (kind, "front", 1)
        fill = [pad] * (len(shape) - len(kernel))
        full = fill + kernel if mode == "front" else kernel + fill
        cut = [n if k == -1 else k for k, n in zip(full, shape, strict=True)]
    corners = itertools.product(*(range(0, n, k) for n, k in zip(shape, cut, strict=True)))
    return [tuple(slice(c, c + k) for c, k in zip(corner, cut, strict=True)) for corner in corners]


def activation_sets(asked: dict[str, Entry]) -> list[Entry]:
    """[{asked, n, score, masked}] with masks over units; members of one set add what they held."""
    groups: dict[str, list[str]] = {}
    for path, s in asked.items():
        gid = s.get("dependency_group_id", "auto")
        groups.setdefault(path if gid in (None, "none", "auto") else f"set {gid}", []).append(path)
    sets = []
    for paths in groups.values():
        method, total = asked[paths[0]].get("method", "l1_norm"), 0.0
        for path in paths:
            numbers = held()[path][method]
            total = total + np.array([numbers[place].sum() for place in regions(asked[path], numbers.shape)])
        score = (np.sqrt(total) if method == "l2_norm" else total).astype(np.float32)
        index = np.arange(len(score))[:, None]
        masked = [(path, 0, index) for path in paths]
        sets.append({"asked": [asked[p] for p in paths], "n": len(score), "score": score, "masked": masked})
    return sets


def spread(s: Entry, kept: np.ndarray, path: str) -> np.ndarray:
    """bool [units] -> [1, ...], as masks are."""
    mask = np.ones(held()[path]["l1_norm"].shape, bool)
    for place, alive in zip(regions(s, mask.shape), kept, strict=True):
        mask[place] = alive
    return mask[None]


def hear(pruner: Any, model: nn.Module, rank: int, size: int) -> None:
    """The one step, as this rank sees it."""
    for micro in range(rank, NUM_MICRO, size):
        if micro in LIVE:
            model.train()(batch(micro))
        pruner.after_backward(0, micro)
