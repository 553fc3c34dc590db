"""The parameters of a run that are quantized: their ranges, what is projected of them, their gradients.

A weight is quantized as it is when the norm behind it is folded (fuse.py), and after it is masked: a masked weight is
zero, which every range holds. Scales are whole on every rank, whatever it holds of the weights: what each rank sees of
a range, or of the gradient of a learned scale, is reduced for all weights together (holding.py). Nothing is sent where
every rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dist_compress import comm
from dist_compress.method import Context
from dist_compress.projection import Function
from dist_compress.quantization import fuse
from dist_compress.quantization.deploy import install
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.granularity import mixed
from dist_compress.quantization.holding import Holding
from dist_compress.quantization.places import Places


class Weights:
    """Their quantizers by the paths of the parameters."""

    def __init__(
        self, context: Context, quantizers: Mapping[str, FakeQuantize], fused: Mapping[str, fuse.Fused]
    ) -> None:
        """`fused`: by the layer that comes first."""
        self.model, self.projection = context.model, context.projection
        self.quantizers, self.fused = quantizers, fused
        self.folds: dict[str, fuse.Fold] = {}
        self._places: Places | None = None

    def install(self) -> None:
        """The modules of the model are those that are trained from here on. Local."""
        get = self.model.get_submodule
        self.folds = {f.layer: fuse.Fold(get(f.layer), get(f.norm)) for f in self.fused.values() if f.norm}
        self.forget()

    def forget(self) -> None:
        """The model is about to be wrapped, or unwrapped: other ranks will hold other parts of it. Local."""
        self._places = None

    @property
    def places(self) -> Places:
        """Asked for once the model is wrapped as it is trained, or not at all."""
        if self._places is None:
            affine = {layer: f"{self.fused[layer].norm}.weight" for layer, fold in self.folds.items() if fold.affine}
            self._places = Places(self.projection, self.quantizers, affine)
        return self._places

    def fold_of(self, path: str) -> fuse.Fold | None:
        module, target = self.quantizers[path].place
        return self.folds.get(module) if target == "weight" else None

    def folded(self, path: str) -> torch.Tensor:
        """What this rank holds of the latent as it is quantized: masked, and folded with the norm as it was when last
        looked at. Local."""
        masked = self.projection.before(path, "quant")
        return self._into(path, masked, self.places.holdings[path])

    def whole(self, path: str) -> torch.Tensor:
        """`folded`, all of it. Collective, if it is sharded."""
        return self._into(path, self.places.whole(path, self.projection.before(path, "quant")), None)

    def _into(self, path: str, masked: torch.Tensor, holding: Holding | None) -> torch.Tensor:
        fold = self.fold_of(path)
        return masked if fold is None else fold.into(masked, fold.used_in(holding))

    @torch.no_grad()
    def look_at_norms(self) -> None:
        """Weights and statistics of norms are as they are folded from here on. Collective: one, if any is sharded."""
        gammas = self.places.gammas()
        for layer, fold in self.folds.items():
            fold.used = fold.factor(gammas.get(layer))

    @torch.no_grad()
    def fit(self) -> None:
        """Take all ranges from the weights as they are now, masked. Collective: of sharded weights of methods that do
        not refit one each, brought together for it."""
        self.look_at_norms()
        for path, quantizer in self.quantizers.items():
            if not quantizer.refits:
                quantizer.fit(self.whole(path))
        self.follow()

    def stepped(self) -> None:
        """The optimizer has made a step. Collective, as `follow` is."""
        for path, quantizer in self.quantizers.items():
            quantizer.stepped(self.projection.latent(path))
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """The weights have changed: take anew what follows them. Collective: one for the norms, one MAX and one SUM for
        the ranges, each if there is any of a sharded weight."""
        self.look_at_norms()
        waiting: dict[str, list[tuple[FakeQuantize, torch.Tensor]]] = {"max": [], "sum": []}
        for path, quantizer in self.quantizers.items():
            if not quantizer.refits:
                continue
            holding, weight = self.places.holdings[path], self.folded(path)
            if holding is None:
                quantizer.fit(weight)
                continue
            with quantizer.showing(holding):
                waiting[quantizer.reduced_by].append((quantizer, quantizer.statistic(weight)))
        for op, found in waiting.items():
            for (quantizer, _), total in zip(found, _reduced([part for _, part in found], op), strict=True):
                quantizer.take(total)

    @torch.no_grad()
    def refit(self, members: Mapping[str, torch.Tensor]) -> None:
        """The weights were cut: ranges of blocks whose members come from several others. Collective: one for each of
        these that is sharded."""
        self.look_at_norms()
        for path, quantizer in self.quantizers.items():
            if path in members and bool(mixed(members[path]).any()):
                quantizer.refit(self.whole(path), members[path])

    def put_on(self) -> None:
        """From the next projection on they are quantized. Local."""
        for path in self.quantizers:
            self.projection.add(path, "quant", self.compressing(path))

    def take_off(self) -> None:
        """They are float again. Local."""
        for path in self.quantizers:
            self.projection.remove(path, "quant")

    def compressing(self, path: str) -> Function:
        """What the projection makes of what this rank holds of one of them."""
        quantizer = self.quantizers[path]

        def compress(masked: torch.Tensor) -> torch.Tensor:
            holding, fold = self.places.holdings[path], self.fold_of(path)
            with quantizer.showing(holding):
                compressed = quantizer.compress(self._into(path, masked, holding))
            return compressed if fold is None else fold.out_of(compressed, fold.used_in(holding))

        return compress

    @torch.no_grad()
    def gradients(self) -> None:
        """Make those of the latents of the reduced ones of what was projected. Collective: one SUM, if there are
        sharded weights of methods that have to know of whole blocks."""
        totals = self._gradient_totals()
        for path, quantizer in self.quantizers.items():
            grad, holding, total = self._grad(path), self.places.holdings[path], totals.get(path)
            if grad is None and total is None:
                continue
            weight, upstream = self._as_quantized(path, grad)
            with quantizer.showing(holding):
                sums = quantizer.gradient_sums(weight, upstream) if holding is None else total
                found = quantizer.weight_gradient(weight, upstream, sums)
            if grad is not None:
                grad.copy_(self._into(path, found, holding))  # of Q(v) / f, where v = w * f

    def _gradient_totals(self) -> dict[str, torch.Tensor]:
        """The `gradient_sums` of sharded weights that were reached on some rank, over all ranks. Where this rank has no
        gradient it counts as zero."""
        found = {}
        for path, quantizer in self.quantizers.items():
            if holding := self.places.holdings[path]:
                grad = self._grad(path)
                with quantizer.showing(holding):
                    sums = quantizer.gradient_sums(*self._as_quantized(path, grad))
                if sums is not None:
                    reached = sums.new_full((1, sums.shape[1]), float(grad is not None))
                    found[path] = torch.cat([reached, sums])
        totals = dict(zip(found, _reduced(list(found.values()), "sum"), strict=True))
        return {path: total[1:] for path, total in totals.items() if bool(total[0, 0] > 0)}

    def _grad(self, path: str) -> torch.Tensor | None:
        return self.projection.layout.grad(self.projection.owner(path))

    def _as_quantized(self, path: str, grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What was quantized, and the gradient of what it became; of what this rank holds."""
        masked, holding, fold = self.projection.before(path, "quant"), self.places.holdings[path], self.fold_of(path)
        grad = torch.zeros_like(masked) if grad is None else grad
        if fold is None:
            return masked, grad
        factor = fold.used_in(holding)
        return fold.into(masked, factor), fold.out_of(grad, factor)

    @torch.no_grad()
    def deliver(self, activations: Iterable[FakeQuantize]) -> None:
        """Fold the norms for good, and leave the quantized weights in the model. `activations`: their quantizers, of
        which some are hooked into norms. Local: of a rank that holds the whole model."""
        self.projection.project()
        held = {path: self.model.get_parameter(path).detach().clone() for path in self.quantizers}
        self.take_off()
        for path, quantizer in self.quantizers.items():
            fold, parameter = self.fold_of(path), self.model.get_parameter(path)
            if fold is None:
                parameter.copy_(held[path])
                continue
            fused = self.fused[quantizer.place[0]]
            fuse.fold(self.model, fused, quantizer.compress(fold.into(held[path], fold.used_in(None))))
            for other in activations:
                if other.place[0] == fused.norm:  # its hook went with the norm
                    install(self.model, *other.place, other)


def _reduced(parts: list[torch.Tensor], op: str) -> list[torch.Tensor]:
    """Each over the ranks, by "max" or "sum", the same on every rank; sums in the order of ranks. Collective, if there
    are any."""
    if not parts:
        return []
    flat = torch.cat([part.flatten() for part in parts])
    flat = comm.all_reduce(flat, "max") if op == "max" else comm.ordered_sum(flat[None], comm.world_size())
    return [t.view_as(p) for t, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
