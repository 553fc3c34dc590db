"""Where a layer looks, towards where the teacher's looks (Zagoruyko and Komodakis 2017, arXiv:1612.03928).

The attention map of a hidden state is the sum over channels of its squares, over positions of length 1; widths play no
part. The loss is the squared distance of both maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dist_compress.distillation.layerwise import LayerTerm, channel_dim
from dist_compress.distillation.term import Moment
from dist_compress.distillation.tokens import Tokens
from dist_compress.errors import UserError


@dataclass
class Options:
    pass


class AttentionTransfer(LayerTerm):
    needs_channels = False

    def compare(self, student: torch.Tensor, teacher: torch.Tensor, moment: Moment) -> torch.Tensor:
        if student.dim() < 3:
            raise UserError(f"distillation: {self.setting.path} is {list(student.shape)}: no positions to attend to.")
        return (attention(student) - attention(teacher)).square().sum(1)

    def compare_tokens(
        self, student: torch.Tensor, teacher: torch.Tensor, moment: Moment, tokens: Tokens
    ) -> torch.Tensor:
        """The maps of the tokens that count, for each of them."""
        own, theirs = (x.masked_fill(~tokens.valid[:, :, None], 0) for x in (student, teacher))
        return (self.compare(own, theirs, moment) * tokens.weight * tokens.valid.sum(1)).sum()


def attention(x: torch.Tensor) -> torch.Tensor:
    """[n, positions], each row of length 1."""
    return F.normalize(x.square().sum(channel_dim(x.shape)).flatten(1))
