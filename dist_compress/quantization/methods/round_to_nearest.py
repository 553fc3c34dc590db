"""Round to nearest: each weight to the nearest of the numbers that its block's extent is cut into.

Parameters only, no data and no training: activations stay as they are. The usual baseline of what is done to language
models (Frantar et al. 2022, arXiv:2210.17323, call it RTN), mostly with int4 and granularity: per_group(128).
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_compress.quantization.fake_quant import FakeQuantize


@dataclass
class Options:
    pass


class RoundToNearest(FakeQuantize):
    trains = refits = activations = False
    apply_method = "clamp_round"
