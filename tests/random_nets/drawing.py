"""From a seed to a random model, an example input and a maker of new inputs."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from random_nets import catalogue
from random_nets.net import BATCH, Builder, RandomNet

NewInput = Callable[[int], torch.Tensor]  # batch -> input
WORDS = 7


def draw(seed: int, most_steps: int = 7) -> tuple[Builder, NewInput]:
    """The builder with its finished net in eval mode, float64, every value away from zero, and `new_input`."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = rng.choice(("image", "image", "image", "tokens", "tokens", "vector", "words"))

    def new_input(batch: int) -> torch.Tensor:
        length = 5 if batch == BATCH or not b.any_length else 4 + batch
        if kind == "words":
            return torch.randint(WORDS, (batch, length))
        return torch.randn(batch, *{"image": (3, 6, 6), "tokens": (length, 6), "vector": (6,)}[kind]).double()

    b = Builder(rng, torch.empty(0))
    b.values[0] = new_input(BATCH)
    if kind == "words":
        value = b.add(nn.Embedding(WORDS, 8), 0)
    else:
        value = catalogue.conv(b, 0) if kind == "image" else catalogue.linear(b, 0)
    for _ in range(rng.randint(3, most_steps)):
        by_rank = {2: catalogue.VECTOR, 3: catalogue.TOKENS, 4: catalogue.IMAGE}
        made = rng.choice(by_rank[b.values[value].dim()])(b, value)
        value = value if made is None else made
    _finish(b, value, kind)
    _randomise(b.net)
    return b, new_input


def _finish(b: Builder, value: int, kind: str) -> None:
    """A head, and sometimes a second output; after an embedding the head may be tied to it."""
    if b.values[value].dim() == 4 and b.maybe(0.8):
        value = b.add(nn.Conv2d(b.sizes(value)[0], 3, 1), value)
    elif b.values[value].dim() < 4:
        tied = kind == "words" and b.sizes(value)[-1] == 8 and b.maybe(0.7)
        head = nn.Linear(b.sizes(value)[-1], WORDS if tied else 3, bias=not tied)
        if tied:
            head.weight = b.net.layers[0].weight
        value = b.add(head, value)
    second = (b.pick(*range(1, len(b.values))),) if b.maybe(0.1) else ()
    b.net.returned = (value, *second)


def _randomise(net: RandomNet) -> None:
    """Statistics and affines of norms away from (0, 1)."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.uniform_(0.5, 1.5)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(0, 0.3)
