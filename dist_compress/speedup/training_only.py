"""Modules that run only in training mode (auxiliary heads): the tape of an eval run cannot see what they read.

What they read is found by one run in training mode; its dims stay, or fine-tuning the small model would fail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Ref
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.walk import each_module

_Reader = tuple[str, str | None, tuple[int, ...]]


def pin_training_inputs(s: Structure, model: nn.Module, args: Any, kwargs: Any) -> None:
    """Pin what modules read that own parameters and were not called in the eval run. The model is left as it was."""
    called = {name for name, _ in s.trace.calls}
    uncalled = {
        module: name for module, name in each_module(model).items() if name not in called and list(module.parameters())
    }
    if not uncalled or not _holds_unused_parameters(s):
        return
    outputs: dict[str | None, list[Ref]] = {}
    for name, refs in s.trace.calls:
        outputs.setdefault(name, []).extend(refs)
    everything = [ref for op in s.trace.tape for ref in op.outputs if ref is not None]  # the maker is unknown
    outputs["an input"] = []
    for reader, maker, shape in _readers(model, uncalled, args, kwargs):
        for ref in outputs.get(maker, everything):
            for var in s.dims(ref):
                if maker in outputs or s.sizes[var] in shape:
                    s.pin(var, f"is read by {reader} in training mode")


def _holds_unused_parameters(s: Structure) -> bool:
    used = {ref.id for op in s.trace.tape for ref in op.inputs}
    return any(info.kind == "param" and key not in used for key, info in s.trace.tensors.items())


def _readers(model: nn.Module, uncalled: dict[nn.Module, str], args: Any, kwargs: Any) -> list[_Reader]:
    """(uncalled module, module that made its input, None when none did, the input's shape), outermost modules only.

    Empty when the model does not run in training mode on this input.
    """
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, str] = {}
    held: list[Any] = []
    found: list[_Reader] = []
    inside: list[str] = []

    def before(module: nn.Module, inputs: Any) -> None:
        if module in uncalled and not inside:
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
            found.extend((uncalled[module], made.get(id(tensor)), tuple(tensor.shape)) for tensor in tensors)
        if module in uncalled:
            inside.append(uncalled[module])

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        held.append(output)
        if module in uncalled:
            inside.pop()
        for leaf in tree_leaves(output):
            made.setdefault(id(leaf), names[module])

    def twice(leaf: Any) -> Any:  # batch statistics need more than one sample
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    args, kwargs = tree_map(twice, (args, kwargs or {}))
    made.update((id(leaf), "an input") for leaf in tree_leaves((args, kwargs)))
    try:
        with untouched(model):
            model.train()
            model(*args, **kwargs)
    except Exception:  # a model that cannot train on this input has nothing to tell
        return []
    finally:
        for handle in handles:
            handle.remove()
    return found
