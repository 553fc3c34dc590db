"""What the training loop asks of a backend. One optimizer step is

    for each round:  with sync_context(last): forward of the wrapped model; backward(loss, round, last)
    finish_gradients(); (gradient rules); clip(max_norm)

Every rank makes the same calls in the same order. Losses are already divided by the global count, so
gradients are summed, never averaged.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dist_compress.config import Config


class Backend:
    """One process computes everything: the base of the others, and right where there is no process group."""

    def __init__(self, config: Config) -> None:
        self.exact = config.train.exact
        self.num_micro = config.train.global_batch_size // config.train.micro_batch_size
        self.model: nn.Module | None = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training. Collective: afterwards every rank holds rank 0's weights and
        buffers."""
        self.model = model
        return model

    def unwrap(self) -> nn.Module:
        """The user's model. Local."""
        assert self.model is not None, "wrap a model first"
        return self.model

    def sync_context(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a round; `last`: it is the step's last one. Local."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, round: int, last: bool) -> None:
        """Accumulate the gradients of one micro-batch (a missing one has a loss of zero). Collective."""
        loss.backward()

    def finish_gradients(self) -> None:
        """Afterwards `grad` of every parameter is the sum over the global batch on every rank. Collective."""

    def grad(self, name: str) -> torch.Tensor | None:
        """The gradient of a parameter after `finish_gradients`. Local."""
        return self.unwrap().get_parameter(name).grad

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients to a global L2 norm of at most `max_norm`. Returns the norm before.
        Collective."""
        return nn.utils.clip_grad_norm_(self.unwrap().parameters(), max_norm)
