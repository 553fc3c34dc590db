"""What the training loop asks of a backend. One optimizer step is

    for each round:  with sync_context(last): forward of the wrapped model; backward(loss, round, last)
    finish_gradients(); (gradient rules on `layout.grad`); clip(max_norm)
    (latent weights back); step(optimizer); (decisions; projection of `layout.local`)

Every rank makes the same calls in the same order. Losses are already divided by the global count, so
gradients are summed, never averaged. Who holds what of weights and gradients is the `layout`; everything else in the
package asks it, and is blind to the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dist_compress import comm, compiling
from dist_compress.compiling import Compiled
from dist_compress.config import Config
from dist_compress.gradient_norm import total_norm
from dist_compress.layout import Layout
from dist_compress.moments import Names, State, each_moment, load_by_name, state_by_name
from dist_compress.recompute import Recompute

Source = Callable[[str], torch.Tensor]  # a whole parameter by its name, on every rank. Collective


class Backend:
    """One process computes everything: the base of the others, and right where there is no process group."""

    sharded = False  # parameters lie in parts: a call of the model is collective, and only `layout` may look at them

    def __init__(self, config: Config, options: Any = None) -> None:
        """`options`: the `Options` of the backend's file. Raises UserError for what it cannot do."""
        self.options, self.exact = options, bool(config.train.exact)
        self.recompute, self.compiles = Recompute(config.train.activation_checkpointing), config.train.compile
        self.compiled: list[Compiled] = []
        if self.compiles:
            compiling.check(config, comm.device())
        self.num_micro = config.train.global_batch_size // config.train.micro_batch_size
        self.model: nn.Module | None = None

    @classmethod
    def can_be_exact(cls, options: Any) -> bool:
        """Whether `train.exact` is possible. Local."""
        return True

    def check(self, model: nn.Module) -> None:
        """Raise UserError for a model that this backend cannot train. Local, the same on every rank."""

    def wrap(self, model: nn.Module, source: Source | None = None, whole: Collection[str] = ()) -> nn.Module:
        """The module to call in training. Collective: afterwards every rank holds its part of rank 0's weights, and
        rank 0's buffers. `source`: where weights come from if the parameters of `model` are on the meta device.
        `whole`: names of the parameters that stay whole on every rank."""
        self.model, self.layout = model, Layout(model)
        self.dress(model)
        return model

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Given what `wrap` returned and an optimizer of its parameters: the module to call in training, and what
        `step` and `moments` are given. `layout` is true from here on. Collective."""
        return module, optimizer

    def release(self) -> None:
        """Take what wraps the model off it, in place; parameters that lie in parts become meta tensors. Whoever needs
        them has read them before. Local."""
        self.undress()

    def dress(self, model: nn.Module) -> None:
        """Change how modules are called: `train.activation_checkpointing`, `train.compile`. To be called in `wrap`,
        before anything else is put around them. Raises UserError. Local."""
        self.recompute.put_on(model)
        if self.compiles:
            self.compiled = compiling.put_on(model, self.graphs(model), self.recompute)

    def undress(self) -> None:
        """They are called as before. To be called in `release`. Local."""
        for forward in self.compiled:
            forward.remove()
        self.compiled = []
        self.recompute.take_off()

    def graphs(self, model: nn.Module) -> list[nn.Module]:
        """The modules of which each is compiled as one graph. Local."""
        return [model]

    def unwrap(self) -> nn.Module:
        """The user's model. Local."""
        assert self.model is not None, "wrap a model first"
        return self.model

    def rest(self) -> None:
        """The model was called: let every rank hold its part of the weights only. Local."""

    def sync_context(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a round; `last`: it is the step's last one. Local."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, round: int, last: bool) -> None:
        """Accumulate the gradients of one micro-batch (a missing one has a loss of zero). Collective."""
        loss.backward()

    def finish_gradients(self) -> None:
        """Afterwards `layout.grad` is the sum over the global batch. Collective."""

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scale the gradients to a global L2 norm of at most `max_norm`. Returns the norm before, the same at any
        number of ranks. Collective."""
        names = [name for name, p in self.unwrap().named_parameters() if p.requires_grad]
        grads = {name: grad for name in names if (grad := self.layout.grad(name)) is not None}
        norm = total_norm(self.layout, names, grads)
        if norm > max_norm:
            for grad in grads.values():
                grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Collective."""
        optimizer.step()

    def moments(self, optimizer: torch.optim.Optimizer, names: Names) -> State:
        """{parameter: {key: what this rank holds of a moment, live, or a plain value}}. Local."""
        return each_moment(state_by_name(optimizer, names), self.layout.unwrapped)

    def load_moments(self, optimizer: torch.optim.Optimizer, names: Names, state: State) -> None:
        """The inverse, for an optimizer that has made no step. Local."""
        load_by_name(optimizer, names, each_moment(state, self.layout.wrapped))
