"""A model as a program of torch.export: its operators, for batches of any size. Everything is local."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from dist_compress.errors import UserError
from dist_compress.export.parts.call import moved, named
from dist_compress.tracing.untouched import plain_attention


def program(model: nn.Module, example: Any, key: str) -> ExportedProgram:
    """`model`, a copy of the caller's on the CPU that may be changed, traced on `example`; its outputs are a dict of
    named tensors. The batch may have any size, and so may the other dims of integers (tokens) where the model's code
    allows. Raises UserError, which begins with `key`."""
    args, kwargs = moved(example, "cpu")
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None):  # keys and values of a call are no output of one
        config.use_cache = False  # type: ignore[union-attr]
    model.register_forward_hook(lambda module, args, output: named(output))
    shapes = tree_map(_free, dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))
    try:
        with quiet(), plain_attention(), torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of torch's, of many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{key}: torch.export cannot trace {type(model).__name__}: {lines[0]} Leave the format out, or let the "
            "model's code not depend on the values of tensors or on the size of the batch."
        ) from error


def _free(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.dim():
        return None
    rest = range(1, leaf.dim() if not leaf.is_floating_point() else 1)
    return {0: Dim.DYNAMIC, **{dim: Dim.AUTO for dim in rest}}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's own talk."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
