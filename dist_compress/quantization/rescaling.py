"""Layers whose input channels are divided by numbers that are folded into what comes before, and their columns
multiplied: the model computes what it did, but its weights or activations lose less when they are rounded.

One rank, the owner of a fold (channels.py), chooses its numbers; one sum hands out those of all folds. Then outputs on
the example are compared with those of before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.linear_form import input_rows
from dist_compress.method import Context
from dist_compress.quantization.channels import Fold, Reader, column_dim
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.heard import Heard, owners, refuse
from dist_compress.quantization.layer import Layer, bring, leave
from dist_compress.tracing.untouched import untouched


@dataclass
class Target:
    """A reader of a fold that the method is to quantize."""

    layer: Layer
    reader: Reader
    statistic: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of its input, float64 [k, features]

    def columns(self, scales: torch.Tensor) -> torch.Tensor:
        """What the weight is multiplied with, broadcastable to it, of the scales of the channels."""
        factor = _by_feature(scales, self.reader)
        return factor[:, None] if column_dim(self.layer.module) == 0 else factor

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """[rows, features] of a tensor in the shape of the weight."""
        return weight.t() if column_dim(self.layer.module) == 0 else weight


class View:
    """A fold as the method sees it."""

    def __init__(self, fold: Fold, targets: Sequence[Target]) -> None:
        self.fold, self.targets, self.num_channels = fold, targets, fold.num_channels

    def by_channel(self, values: Sequence[torch.Tensor], reduce: str) -> torch.Tensor:
        """float64 [num_channels]: "amax" or "mean" of `values`, [features] of each target, over the features of each
        channel; 0 where there are none."""
        index = torch.cat([target.reader.channels for target in self.targets]).to(values[0].device)
        flat, known = torch.cat([value.double() for value in values]), index >= 0
        out = torch.zeros(self.num_channels, dtype=torch.float64, device=flat.device)
        return out.scatter_reduce(0, index[known], flat[known], reduce, include_self=False)


class Rescales(FakeQuantize):
    """The base of methods that rescale the channels of layers before they are quantized."""

    mixes = False
    reduction = "sum"  # of `input_statistic` over calls, micro-batches, steps and ranks: "sum" or "max"

    def input_statistic(self, inputs: torch.Tensor) -> torch.Tensor:
        """float64 [k, features] from what a layer is called with, [tokens, features]."""
        raise NotImplementedError

    def channel_scales(self, view: View) -> torch.Tensor:
        """float64 [num_channels], above 0: what the columns are multiplied with. Local: one rank decides a fold."""
        raise NotImplementedError


class Rescaling(Heard):
    """One round of calibration for the layers of one method, then `finish`."""

    def __init__(self, context: Context, layers: Sequence[Layer], folds: Sequence[Fold]) -> None:
        self.context, self.layers = context, {layer.name: layer for layer in layers}
        views = [View(fold, self._targets(fold)) for fold in folds]
        self.views = [view for view in views if view.targets]
        measures = {}
        self.source: dict[str, str] = {}  # of a target: whose statistic it shares
        costs: dict[str, float] = {}
        for number, view in enumerate(self.views):
            first: dict[str, str] = {}
            for target in view.targets:
                layer, features = target.layer, len(target.reader.channels)
                self.source[layer.name] = source = first.setdefault(target.reader.source, layer.name)
                costs[str(number)] = costs.get(str(number), 0) + layer.shape.numel() * features
                if source == layer.name:
                    measures[source] = self._measure(layer, features)
        by_view = owners(costs)
        self.view_owner = [by_view[str(number)] for number in range(len(self.views))]
        names = {self.source[t.layer.name]: n for n, view in enumerate(self.views) for t in view.targets}
        self.owner = {source: self.view_owner[number] for source, number in names.items()}
        reduction = getattr(layers[0].quantizer, "reduction")  # noqa: B009 - Rescales
        super().__init__(context.model, measures, reduction, context.num_micro)

    def _targets(self, fold: Fold) -> list[Target]:
        found = [Target(self.layers[r.layer], r) for r in fold.readers if r.layer in self.layers]
        for target in found[1:]:
            if target.layer.quantizer.options != found[0].layer.quantizer.options:
                raise UserError(
                    f"quantization.config_list: {found[0].layer.name} and {target.layer.name} read the same channels, "
                    f"which {target.layer.method} rescales for both, but their options differ. Give them the same."
                )
        return found

    def _measure(self, layer: Layer, features: int):  # type: ignore[no-untyped-def]
        quantizer, module = layer.quantizer, layer.module
        assert isinstance(quantizer, Rescales)
        nothing = torch.zeros(1, features, device=layer.device)
        return lambda x: quantizer.input_statistic(input_rows(module, x)[0]), quantizer.input_statistic(nothing).shape

    def notes(self) -> list[str]:
        """Which layers stay as they are. Local."""
        left = [name for name in self.layers if name not in self.source]
        method = next(iter(self.layers.values())).method
        if not left:
            return []
        listed = ", ".join(left[:6]) + (f", ... ({len(left)} in all)" if len(left) > 6 else "")
        return [f"{method}: no exact fold into what comes before, so not rescaled: {listed}"]

    @torch.no_grad()
    def finish(self) -> None:
        """Choose the scales and put them into the model. Collective. Raises UserError on every rank where inputs are
        not finite, RuntimeError where the model is another one."""
        self.close()
        statistics = self.totals(self.owner)
        failures: list[str] = []
        found = []
        targets = [(t.layer, owner) for v, owner in zip(self.views, self.view_owner, strict=True) for t in v.targets]
        layers = [layer for layer, _ in targets]
        with self.context.projection.lifted():
            before = self._outputs()
            bring(layers, {layer.name: owner for layer, owner in targets})
            for view, owner in zip(self.views, self.view_owner, strict=True):
                mine = self._scales(view, statistics, failures) if owner == comm.rank() else None
                zeros = torch.zeros(view.num_channels, dtype=torch.float64, device=view.targets[0].layer.device)
                found.append(zeros if mine is None else mine)
            leave(layers)
            refuse(failures, "The model or the data is broken; look at the float model first.")
            scales = comm.all_reduce(torch.cat(found)).split([len(s) for s in found])
            for view, scale in zip(self.views, scales, strict=True):
                self._apply(view.fold, scale)
            self._check(before, self._outputs())

    def _scales(self, view: View, statistics: dict[str, torch.Tensor], failures: list[str]) -> torch.Tensor | None:
        """1 for channels that no reader has. Local."""
        for target in view.targets:
            target.statistic = statistics[self.source[target.layer.name]]
        first = view.targets[0].layer
        assert isinstance(first.quantizer, Rescales)
        if not all(bool(target.statistic.isfinite().all()) for target in view.targets):
            failures.append(f"{first.name}: {first.method} heard inputs that are NaN or infinite")
            return None
        scales = first.quantizer.channel_scales(view)
        assert bool((scales > 0).all() and scales.isfinite().all())
        read = torch.cat([reader.channels for reader in view.fold.readers]).to(scales.device)
        known = torch.zeros(view.num_channels, dtype=torch.bool, device=scales.device)
        known[read[read >= 0]] = True
        return torch.where(known, scales, 1.0)

    def _apply(self, fold: Fold, scales: torch.Tensor) -> None:
        projection = self.context.projection

        def held(name: str, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """What this rank holds of a latent, and of a factor that broadcasts to all of it."""
            return projection.latent(name), projection.layout.part(projection.owner(name), factor)

        for name, dim in fold.parameters:
            num_dims = len(projection.layout.shape(projection.owner(name)))
            tensor, divisor = held(name, scales.view([-1 if d == dim else 1 for d in range(num_dims)]))
            tensor.copy_(tensor.double() / divisor)
        for reader in fold.readers:
            columns = _by_feature(scales, reader)
            dim = column_dim(self.context.model.get_submodule(reader.layer))
            tensor, factor = held(f"{reader.layer}.weight", columns[:, None] if dim == 0 else columns)
            tensor.copy_(tensor.double() * factor)

    def _outputs(self) -> list[torch.Tensor]:
        assert self.context.example is not None
        args, kwargs = self.context.example
        with untouched(self.context.model):
            out = self.context.model(*args, **kwargs)
        self.context.rest()
        return [t.detach().clone() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def _check(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
        """The same on every rank: all have the model and the example."""
        for old, new in zip(before, after, strict=True):
            difference = float((new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-30))
            allowed = torch.finfo(old.dtype).eps ** 0.5
            if not difference <= allowed:
                raise RuntimeError(
                    f"The model with rescaled channels differs from what it was by {difference:.3g} (relative), more "
                    f"than {allowed:.3g}: its program is not what was traced. Exclude the layers, or choose ptq."
                )


def _by_feature(scales: torch.Tensor, reader: Reader) -> torch.Tensor:
    """float64 [features]; 1 where a feature has no channel."""
    index = reader.channels.to(scales.device)
    return torch.where(index >= 0, scales[index.clamp(min=0)], 1.0)
