"""Hidden states towards the teacher's, their channels stretched to its width by linear interpolation: nothing to train
(the name is NNI's, whose Adaptive1dLayerwiseDistiller trains a linear map; that is `fitnets` here)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dist_compress.distillation.layerwise import LayerTerm, channel_dim
from dist_compress.distillation.term import Moment


@dataclass
class Options:
    pass


class Adaptive1dLayerwise(LayerTerm):
    needs_channels = False

    def compare(self, student: torch.Tensor, teacher: torch.Tensor, moment: Moment) -> torch.Tensor:
        return super().compare(stretched(student, teacher.shape[channel_dim(teacher.shape)]), teacher, moment)


def stretched(x: torch.Tensor, width: int) -> torch.Tensor:
    """`x` with `width` channels, interpolated between their ends."""
    dim = channel_dim(x.shape)
    if x.shape[dim] == width:
        return x
    last = x.movedim(dim, -1)
    rows = F.interpolate(last.reshape(1, -1, last.shape[-1]), size=width, mode="linear", align_corners=True)
    return rows.view(*last.shape[:-1], width).movedim(-1, dim)
