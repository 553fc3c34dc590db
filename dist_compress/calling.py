"""How models are called, and what of their answer is logits. Everything here is local."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import register_pytree_node

from dist_compress.errors import UserError

IGNORED = -100  # the target of a token that does not count


def call(model: nn.Module, inputs: Any) -> Any:
    """`inputs`: a tensor, or a dict of keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def class_name(model: nn.Module) -> str:
    """Of the user's class, also where FSDP2 has put one of its own in its place."""
    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def logits(output: Any) -> Any:
    """The logits [n, classes] (of text [n, tokens, vocabulary]) of a plain tensor, a Hugging Face output or a
    torchvision namedtuple; Headless in an output of `call_headless`."""
    return output if isinstance(output, torch.Tensor) else output.logits


@dataclass
class Headless:
    """In place of logits, what they would be made of: hidden @ weight.T + bias. The fields are part of the graph of the
    forward pass, where DistributedDataParallel looks for what was used, and FSDP2 for what its backward begins with."""

    hidden: torch.Tensor  # [n, tokens, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    num_correct: torch.Tensor | None = None  # of the targets, once counted


# FSDP2 hooks the tensors of an output, wherever they lie in it.
register_pytree_node(
    Headless,
    lambda found: ([found.hidden, found.weight, found.bias], found.num_correct),
    lambda leaves, num_correct: Headless(*leaves, num_correct),  # type: ignore[misc]
)


def call_headless(model: nn.Module, inputs: Any, key: str) -> Any:
    """Call `model` but for its output layer; the logits of the answer are a Headless. Raises UserError naming `key`
    when it has no output layer of its own, or does more than return what the layer makes. A layer that is sharded is
    gathered for its forward pass alone, so what the loss computes with is a copy."""
    head = output_layer(model, key)
    if any(not hook.__module__.startswith("torch.distributed.") for hook in head._forward_hooks.values()):
        raise UserError(f"{key}=true: the output of the last layer is a target itself. Leave it out, or set false.")

    parameters = (head.weight, *([] if head.bias is None else [head.bias]))
    keep = torch.clone if any(isinstance(p, DTensor) for p in parameters) else _view

    def forward(hidden: torch.Tensor) -> Headless:
        return Headless(hidden, keep(head.weight), None if head.bias is None else keep(head.bias))

    before = vars(head).get("forward")
    head.forward = forward  # type: ignore[method-assign]
    try:
        output = call(model, inputs)
    except (TypeError, AttributeError) as error:
        if "Headless" not in str(error):
            raise
        name = type(getattr(model, "module", model)).__name__
        raise UserError(f"{key}=true: {name} changes its logits after the output layer ({error}). Set false.") from None
    finally:
        del head.forward
        if before is not None:
            head.forward = before  # type: ignore[method-assign]
    return output


def _view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view_as(tensor)


def output_layer(model: nn.Module, key: str) -> nn.Linear:
    """The layer that makes the logits, found as Hugging Face models tell it. Raises UserError naming `key`."""
    own = model if hasattr(model, "get_output_embeddings") else getattr(model, "module", model)  # wrapped by DDP
    find: Any = getattr(own, "get_output_embeddings", lambda: None)
    head = find()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{key}=true: {type(own).__name__} has no get_output_embeddings() that returns a Linear layer. Define it, "
            "or set false."
        )
    return head
