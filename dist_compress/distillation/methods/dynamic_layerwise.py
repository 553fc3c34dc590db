"""Each hidden state towards the nearest of several of the teacher's, in every micro-batch anew (NNI's
DynamicLayerwiseDistiller; the choice of layers as in Jiao et al. 2020, arXiv:1909.10351).

Where widths differ a trained linear map leads from the student's to the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.distillation.layerwise import LayerTerm


@dataclass
class Options:
    pass


class DynamicLayerwise(LayerTerm):
    most_links = 1000
    translates = True

    def chosen(self, losses: torch.Tensor) -> torch.Tensor:
        return losses.min()
