"""Hidden states towards the teacher's, through a trained linear map where widths differ (Romero et al. 2015,
arXiv:1412.6550)."""

from __future__ import annotations

from dataclasses import dataclass

from dist_compress.distillation.layerwise import LayerTerm


@dataclass
class Options:
    pass


class FitNets(LayerTerm):
    translates = True
