"""A random model: steps one after another, each reading values that earlier steps made."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BATCH = 2  # of the inputs that a net is drawn and planned with
Step = Callable[..., Any]


class RandomNet(nn.Module):
    """Runs `program`: (step, indices of the values it reads); what it returns is appended to the values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.program: list[tuple[Step, tuple[int, ...]]] = []
        self.returned: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x]
        for step, sources in self.program:
            made = step(*(values[i] for i in sources))
            values.extend(made if isinstance(made, tuple | list) else [made])
        return tuple(values[i] for i in self.returned)


class Builder:
    """Grows a RandomNet by steps that it runs at once, so that every shape is known. `x`: an example of the input."""

    def __init__(self, rng: random.Random, x: torch.Tensor) -> None:
        self.rng = rng
        self.net = RandomNet().double().eval()
        self.values = [x]
        self.any_length = True  # whether the net takes other numbers of tokens
        self.fed: list[tuple[str, str]] = []  # (fqn of a layer, fqn of the layer that reads its output)
        self._maker: dict[int, str] = {}  # value -> fqn of the layer behind it, through activations

    def add(self, step: Step, *sources: int) -> int:
        """The index of the (first) value that `step` makes. A module becomes a layer of the net, once."""
        first = len(self.values)
        if isinstance(step, nn.Module):
            known = [i for i, layer in enumerate(self.net.layers) if layer is step]
            if not known:
                self.net.layers.append(step.double().eval())
            fqn = f"layers.{known[0] if known else len(self.net.layers) - 1}"
            if sources[0] in self._maker:
                self.fed.append((self._maker[sources[0]], fqn))
            if any(True for _ in step.parameters()):
                self._maker[first] = fqn
        if first not in self._maker and len(sources) == 1 and sources[0] in self._maker:
            self._maker[first] = self._maker[sources[0]]
        self.net.program.append((step, sources))
        with torch.no_grad():
            made = step(*(self.values[i] for i in sources))
        self.values.extend(made if isinstance(made, tuple | list) else [made])
        return first

    def sizes(self, value: int) -> list[int]:
        """The shape without the batch."""
        return list(self.values[value].shape[1:])

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def same_shape(self, value: int) -> list[int]:
        """Earlier values of the shape of `value`, the input of the net excluded."""
        shape = self.values[value].shape
        return [i for i in range(1, len(self.values)) if i != value and self.values[i].shape == shape]
