"""The parameters of a run that are quantized: their ranges, what is projected of them, their gradients.

A weight is quantized as it is when the norm behind it is folded (fuse.py), and after it is masked: a masked weight is
zero, which every range holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dist_compress.method import Context
from dist_compress.projection import Function
from dist_compress.quantization import fuse
from dist_compress.quantization.deploy import install
from dist_compress.quantization.fake_quant import FakeQuantize


class Weights:
    """Their quantizers by the paths of the parameters. Between two installations the model is cut."""

    def __init__(
        self, context: Context, quantizers: Mapping[str, FakeQuantize], fused: Mapping[str, fuse.Fused]
    ) -> None:
        """`fused`: by the layer that comes first."""
        self.model, self.projection = context.model, context.projection
        self.quantizers, self.fused = quantizers, fused
        self.folds: dict[str, fuse.Fold] = {}

    def install(self) -> None:
        """The modules of the model are those that are trained from here on. Local."""
        get = self.model.get_submodule
        self.folds = {f.layer: fuse.Fold(get(f.layer), get(f.norm)) for f in self.fused.values() if f.norm}

    def fold_of(self, path: str) -> fuse.Fold | None:
        module, target = self.quantizers[path].place
        return self.folds.get(module) if target == "weight" else None

    def folded(self, path: str) -> torch.Tensor:
        """The latent as it is quantized: masked, and folded with the norm that the model has now."""
        masked, fold = self.projection.before(path, "quant"), self.fold_of(path)
        return masked if fold is None else fold.into(masked)

    def fit(self) -> None:
        """Take the ranges from the weights. The weights are projected, with their masks. Local."""
        for path, quantizer in self.quantizers.items():
            quantizer.fit(self.folded(path))

    def refit(self, members: Mapping[str, torch.Tensor]) -> None:
        """The weights were cut: ranges of blocks whose members come from several others. Local."""
        for path in members.keys() & self.quantizers.keys():
            self.quantizers[path].refit(self.folded(path), members[path])

    def put_on(self) -> None:
        """From the next projection on they are quantized. Local."""
        for path in self.quantizers:
            self.projection.add(path, "quant", self.compressing(path))

    def take_off(self) -> None:
        """They are float again. Local."""
        for path in self.quantizers:
            self.projection.remove(path, "quant")

    def compressing(self, path: str) -> Function:
        """What the projection makes of one of them."""
        return fuse.compressing(self.quantizers[path], self.fold_of(path))

    def hold(self, held: bool) -> None:
        """Whether ranges stay as they are, even of methods that take them from the weights at every step."""
        for quantizer in self.quantizers.values():
            quantizer.held = held

    def gradients(self) -> None:
        """Make those of the latents of the reduced ones of what was projected. Local."""
        for path, quantizer in self.quantizers.items():
            parameter = self.model.get_parameter(path)
            if parameter.grad is not None:
                masked = self.projection.before(path, "quant")
                parameter.grad.copy_(fuse.gradient(quantizer, self.fold_of(path), masked, parameter.grad))

    def deliver(self, activations: Iterable[FakeQuantize]) -> None:
        """Fold the norms for good, and leave the quantized weights in the model. `activations`: their quantizers, of
        which some are hooked into norms. Local."""
        self.projection.project()
        held = {path: self.model.get_parameter(path).detach().clone() for path in self.quantizers}
        self.take_off()
        for path, quantizer in self.quantizers.items():
            fold, parameter = self.fold_of(path), self.model.get_parameter(path)
            if fold is None:
                parameter.copy_(held[path])
                continue
            fused = self.fused[quantizer.place[0]]
            fuse.fold(self.model, fused, quantizer.compress(fold.into(held[path])))
            for other in activations:
                if other.place[0] == fused.norm:  # its hook went with the norm
                    install(self.model, *other.place, other)
