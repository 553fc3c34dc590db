"""Who holds what of the parameters that are quantized, and of the norms that are folded into them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.exchange import Exchange, Span
from dist_compress.parts import join
from dist_compress.projection import Projection
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.holding import Holding


class Places:
    """For as long as the model is wrapped as it is. Building it is local; the same on every rank."""

    def __init__(
        self, projection: Projection, quantizers: Mapping[str, FakeQuantize], norms: Mapping[str, str]
    ) -> None:
        """`quantizers`: by the paths of the parameters; `norms`: the weights of those that are folded, by layer. Raises
        UserError for a method that cannot follow parts of a parameter."""
        self.projection, layout = projection, projection.layout
        self.sharded = not all(layout.is_whole(name) for name, _ in projection.model.named_parameters())
        self.holdings: dict[str, Holding | None] = {}
        for path, quantizer in quantizers.items():
            name, whole = projection.owner(path), layout.is_whole(projection.owner(path))
            self.holdings[path] = None if whole else Holding(layout, name, quantizer.spec.granularity)
            if not whole and quantizer.refits and type(quantizer).fit is not FakeQuantize.fit:
                method = type(quantizer).__module__.rpartition(".")[2]
                raise UserError(
                    f"quantization.config_list: {path} is sharded, and the method {method} takes its range at every "
                    "step by `fit`, which has to see all of it. Give the method `statistic` and `take` instead, or "
                    "use backend=ddp."
                )
        self.norms = {layer: projection.owner(name) for layer, name in norms.items()}
        names = list(dict.fromkeys(self.norms.values()))
        every = [Span(name, 0, layout.shape(name).numel()) for name in names]
        holdings = {name: layout.holdings(name) for name in names}
        self._exchange = Exchange(holdings, [every] * comm.world_size())

    def gammas(self) -> dict[str, torch.Tensor]:
        """The weights of the norms, masked, whole on every rank, by their layers. Collective: one for all, if any is
        sharded."""

        def read(name: str) -> torch.Tensor:
            return self.projection.before(name, "quant").reshape(-1)

        found = self._exchange.move(self._exchange.pick(read), read)
        whole = {span.name: flat for span, flat in zip(self._exchange.wants, found, strict=True)}
        return {layer: whole[name] for layer, name in self.norms.items()}

    def whole(self, path: str, local: torch.Tensor) -> torch.Tensor:
        """A tensor of which every rank has what it holds of a parameter, in the parameter's shape. Collective, if it is
        sharded."""
        holding = self.holdings[path]
        if holding is None:
            return local
        return join(local, holding.layout.holdings(holding.name), holding.shape)
