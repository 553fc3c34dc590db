"""Layers that one rank solves for: the integers of their weights from the sums of what they are called with.

The ranks sum the statistic of each layer in the order of the micro-batches; its owner solves, at the same time as the
other owners solve theirs, and hands out weight, scale and zero point. With one owner the result is the same on every
rank, whatever its solver rounds. Layers that read the same tensor share the statistic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dist_compress import comm
from dist_compress.linear_form import input_rows, weight_rows
from dist_compress.method import Context
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.heard import Heard, owners, refuse
from dist_compress.quantization.layer import Layer, bring, leave


class Solves(FakeQuantize):
    """The base of methods that solve for the weights of a layer. For activations they are what they derive from."""

    mixes = False
    solved = False

    def solve(
        self, module: nn.Module, weight: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """The weight with every element on a number that it can be quantized to, and these by `scale` and `zero_point`,
        which it sets. `gram`: X^T X, float64 [groups, features, features] (see linear_form.py); where `keep`, bool, is
        False the weight is 0 and stays it. Local: one rank solves a layer. Raises LinAlgError if it cannot."""
        raise NotImplementedError

    def fit(self, weight: torch.Tensor) -> None:
        if not self.solved:
            super().fit(weight)


class Solving(Heard):
    """One round of calibration, then `finish`."""

    def __init__(self, context: Context, layers: Sequence[Layer], sources: Mapping[str, str]) -> None:
        """`sources`: {layer: the first of those that read the same tensor}."""
        self.layers, self.projection = layers, context.projection
        first: dict[str, str] = {}
        self.source = {x.name: first.setdefault(sources.get(x.name, x.name), x.name) for x in layers}
        measures, costs = {}, dict.fromkeys(first.values(), 0.0)
        for layer in layers:
            groups, rows, features = weight_rows(layer.module, torch.empty(layer.shape, device="meta")).shape
            costs[self.source[layer.name]] += groups * (features**3 + rows * features**2)
            if self.source[layer.name] == layer.name:
                measures[layer.name] = _measure(layer.module), (groups, features, features)
        self.owner = owners(costs)
        super().__init__(context.model, measures, "sum", context.num_micro)

    @torch.no_grad()
    def finish(self) -> None:
        """Solve and put the weights into the model. Collective. Raises UserError on every rank when a layer has no
        solution."""
        self.close()
        grams = self.totals(self.owner)
        solved: dict[str, torch.Tensor] = {}
        failures = []
        with self.projection.lifted():
            bring(self.layers, {layer.name: self.owner[self.source[layer.name]] for layer in self.layers})
            for layer in [x for x in self.layers if self.source[x.name] in grams]:
                gram, weight = grams[self.source[layer.name]], layer.read()
                try:
                    if not gram.any():
                        raise torch.linalg.LinAlgError("nothing was heard of its inputs that is not zero")
                    assert isinstance(layer.quantizer, Solves)
                    found = layer.quantizer.solve(layer.module, weight, gram, layer.keep)
                    if not bool(found.isfinite().all()):
                        raise torch.linalg.LinAlgError("weights or inputs are no finite numbers")
                    solved[layer.name] = found = found.to(weight.dtype)
                    if not torch.equal(layer.quantizer.compress(found), found):
                        raise torch.linalg.LinAlgError("apply_method makes other numbers of those it was solved for")
                except torch.linalg.LinAlgError as error:
                    failures.append(f"{layer.name}: {layer.method} has no solution: {error}")
            leave(self.layers)
            refuse(failures, "Raise the dampening in the method's options, calibrate longer, or exclude the layer.")
            for layer in self.layers:
                self._hand_out(layer, solved.get(layer.name))

    def _hand_out(self, layer: Layer, weight: torch.Tensor | None) -> None:
        """Weight, scale and zero point of the owner, here. Collective: one broadcast."""
        q, mine = layer.quantizer, weight
        if mine is None:
            mine = torch.empty(layer.shape, dtype=layer.dtype, device=layer.device)
        parts = [mine, q.scale, q.zero_point]
        flat = torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])
        sizes = [part.numel() * part.element_size() for part in parts]
        raw = comm.broadcast(flat, self.owner[self.source[layer.name]]).split(sizes)
        new, scale, zero_point = (
            r.clone().view(part.dtype).view(part.shape) for r, part in zip(raw, parts, strict=True)
        )
        q.scale.copy_(scale)
        q.zero_point.copy_(zero_point)
        layer.write(new)
        assert isinstance(q, Solves)
        q.solved = True


def _measure(module: nn.Module):  # type: ignore[no-untyped-def]
    def gram(x: torch.Tensor) -> torch.Tensor:
        inputs = input_rows(module, x).double()
        return inputs.transpose(1, 2) @ inputs

    return gram
