"""A block of a transformer, and a quantizer whose calibration has ended, for tests of methods that change weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dist_compress import comm
from dist_compress.config import Config, QuantizationConfig
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.quantization import Quantizer
from dist_compress.target import Coupling

SIZE = 16
LINEAR = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int4"}]


class Block(nn.Module):
    """Pre-norm attention with two heads, and a gated MLP; outliers in some channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SIZE), nn.RMSNorm(SIZE)
        self.q, self.k, self.v, self.o = (nn.Linear(SIZE, SIZE) for _ in range(4))
        self.gate, self.up = nn.Linear(SIZE, 24), nn.Linear(SIZE, 24)
        self.down = nn.Linear(24, SIZE, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            self.norm1.weight[3], self.norm2.weight[5] = 9.0, 7.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, tokens, SIZE]
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


MIX = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(42))


def micro(step: int, j: int) -> torch.Tensor:
    """Correlated inputs, [2, 6, SIZE]."""
    return torch.randn(2, 6, SIZE, generator=torch.Generator().manual_seed(100 * step + j)) @ MIX


def attached(model: nn.Module, example: Any = None, num_micro: int = 4, **config: Any) -> Quantizer:
    """`example`: (args, kwargs), or a micro-batch of `micro`."""
    quantizer = Quantizer(Config(quantization=QuantizationConfig(**config)))
    example = ((micro(9, 9),), {}) if example is None else example
    context = Context(Config(), model, Projection(model), Coupling(), num_micro, 10, 5.0, example)
    quantizer.attach(context)
    context.projection.project()
    return quantizer


def shown(quantizer: Quantizer, inputs: Any = micro, steps: int = 2) -> Quantizer:
    """The rounds of the calibration, of which each rank has its share; not yet begun."""
    model = quantizer.context.model.eval()
    for listener, _ in quantizer.rounds():
        listener.calibrating = True
        with torch.no_grad():
            for step in range(steps):
                for j in range(comm.rank(), quantizer.context.num_micro, comm.world_size()):
                    given = inputs(step, j)
                    model(**given) if isinstance(given, dict) else model(given)
                    listener.count_pass()
                listener.end_step()
        listener.calibrating = False
    return quantizer
