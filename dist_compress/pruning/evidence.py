"""What the owners see at a decision: latent weights and reduced gradients, brought to who decides on them.

One exchange for everything; nothing is sent where every rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.exchange import Exchange, Picked, Span
from dist_compress.projection import Projection
from dist_compress.pruning.elements import GRAD, Elements
from dist_compress.pruning.mask import owners
from dist_compress.pruning.metric import Metric, View
from dist_compress.pruning.ownership import balanced, local_member
from dist_compress.pruning.units import UnitSet, scales
from dist_compress.target import Member


@dataclass(frozen=True)
class Found:
    """What one rank was brought for one decision."""

    targets: Collection[str]
    gradients: bool  # whether those of the last step are among it; the same on every rank
    flat: Mapping[Span, torch.Tensor]


class Evidence:
    """For the model as it is trained: wrapped, sharded or not. Building it is local."""

    def __init__(
        self, projection: Projection, sets: Sequence[UnitSet], elements: Elements, metrics: Mapping[str, Metric]
    ) -> None:
        """`metrics`: by target."""
        self.projection, self.sets, self.elements, self.metrics = projection, sets, elements, metrics
        self.names = owners(projection.model)
        self.reads = [dict.fromkeys(self.names[m.fqn] for m in (*s.scored, *scales(s))) for s in sets]
        self.sizes = {name: projection.layout.shape(name).numel() for read in self.reads for name in read}
        weights = {i: sum(self.sizes[name] for name in read) for i, read in enumerate(self.reads)}
        self.owner = balanced(weights, comm.world_size())
        solved = [x.name for x in elements.tensors() if metrics[x.setting.name].solves]
        self.solver = {name: i % comm.world_size() for i, name in enumerate(solved)}  # of a layer, its owner
        self._exchanges: dict[tuple[frozenset[str], bool], Exchange] = {}
        self.gradients: Picked | None = None  # of the step whose decision comes next

    def _exchange(self, targets: Collection[str], gradients: bool) -> Exchange:
        key = frozenset(targets), gradients
        if key not in self._exchanges:
            layout, wants = self.projection.layout, []
            due = {name: metric for name, metric in self.metrics.items() if name in key[0]}
            units = any(target in due for s in self.sets for target in s.targets)  # all are scored, or none
            for rank in range(comm.world_size()):
                mine = [read for i, read in enumerate(self.reads) if units and self.owner[i] == rank]
                names = dict.fromkeys(name for read in mine for name in read)
                own = [Span(name, 0, self.sizes[name]) for name in names]
                solved = [
                    Span(x.name, 0, x.blocks.num * x.blocks.size)
                    for x in self.elements.tensors()
                    if x.setting.name in due and self.solver.get(x.name) == rank
                ]
                wants.append([*own, *solved, *self.elements.wants(rank, due, gradients)])
            holdings = {s.name: layout.holdings(s.name.removeprefix(GRAD)) for spans in wants for s in spans}
            self._exchanges[key] = Exchange(holdings, wants)
        return self._exchanges[key]

    def keep_gradients(self, targets: Collection[str]) -> None:
        """What this rank has of the reduced gradients that are wanted, before clipping changes them. Local."""
        picked = self._exchange(targets, True).pick(self._gradient, lambda name: name.startswith(GRAD))
        self.gradients = {part: grad.clone() for part, grad in picked.items()}

    def gather(self, targets: Collection[str]) -> Found:
        """All that this rank wants to decide on `targets`; gradients if they were kept. Collective unless every rank
        holds what it wants."""
        gradients, self.gradients = self.gradients, None
        exchange = self._exchange(targets, gradients is not None)
        picked = exchange.pick(self._latent, lambda name: not name.startswith(GRAD)) | (gradients or {})
        flat = zip(exchange.wants, exchange.move(picked, self._latent), strict=True)
        return Found(targets, gradients is not None, dict(flat))

    def rows(self, found: Found, kind: str = "") -> dict[str, list[torch.Tensor]]:
        """{parameter: [blocks, weights of a block] for each run of slabs this rank decides} of the latents that were
        found, or of their gradients if `kind` is GRAD. Local."""
        out = {}
        for tensor in self.elements.tensors():
            heard = found.gradients and self.metrics[tensor.setting.name].hears_gradients
            scored = tensor.setting.name in found.targets and tensor.name not in self.solver
            if scored and (heard or not kind):
                runs = self.elements.placed.owned(tensor.name)
                out[tensor.name] = [r.rows(found.flat[Span(kind + tensor.name, r.start, r.end)]) for r in runs]
        return out

    def whole(self, name: str, found: Found) -> torch.Tensor:
        """The latent of a parameter in its shape, for the owner of the layer or of a set that reads it. Local."""
        name = self.projection.owner(name)
        shape = self.projection.layout.shape(name)
        flat = found.flat.get(Span(name, 0, shape.numel()))
        if flat is None and not self.projection.layout.is_whole(name):
            raise UserError(f"{name} is sharded: units are scored by their own weights and by the norms behind them.")
        return self.projection.latent(name) if flat is None else flat.view(shape)

    def _latent(self, name: str) -> torch.Tensor:
        """Of a parameter, or of the one whose gradient is meant."""
        return self.projection.latent(name.removeprefix(GRAD)).reshape(-1)

    def _gradient(self, name: str) -> torch.Tensor:
        """Zeros where no micro-batch reached the parameter."""
        grad = self.projection.layout.grad(name.removeprefix(GRAD))
        return torch.zeros_like(self._latent(name)) if grad is None else grad.reshape(-1)


def view(units: UnitSet, latent: Callable[[str], torch.Tensor], statistic: torch.Tensor | None = None) -> View:
    """A set as a metric sees it."""
    return View(units.num_units, units.scored, latent, statistic, scales(units))


def local_view(units: UnitSet, projection: Projection) -> View:
    """What of a set lies in the parameters as this rank holds them; of sharded ones only vectors."""

    def local(members: Sequence[Member]) -> tuple[Member, ...]:
        return tuple(found for m in members if (found := local_member(projection.layout, m)))

    return View(units.num_units, local(units.scored), projection.latent, None, local(scales(units)))
