"""Augmentation of a batch on its device; every draw is a hash of (seed, epoch, sample id), so any rank gets
the same.

pad_crop[_flip]: He et al. 2015, section 4.2 (zero padding of an eighth of the side, a random crop, a mirror).
random_resized_crop: Szegedy et al. 2014, section 6 (8 to 100 % of the area, aspect 3/4 to 4/3), with a
mirror.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from dist_compress.hashing import below, uniform

CHOICES = ("none", "pad_crop", "pad_crop_flip", "random_resized_crop")
_X, _Y, _FLIP, _AREA, _ASPECT = range(1, 6)  # purposes of the draws


def pad_crop(images: torch.Tensor, hashes: torch.Tensor, flip: bool) -> torch.Tensor:
    """[n, C, S, S] of any dtype and int64 [n] -> the same shape: each image shifted by up to S / 8, then
    mirrored."""
    n, channels, height, width = images.shape
    pad = max(height // 8, 1)
    rows = torch.arange(height, device=images.device) + (below(hashes, _Y, 2 * pad + 1) - pad)[:, None]
    columns = torch.arange(width, device=images.device).expand(n, -1)
    if flip:
        columns = torch.where(below(hashes, _FLIP, 2)[:, None].bool(), columns.flip(1), columns)
    columns = columns + (below(hashes, _X, 2 * pad + 1) - pad)[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    picked = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, channels, -1))
    return picked.view_as(images) * inside[:, None]


def crop_boxes(hashes: torch.Tensor) -> torch.Tensor:
    """int64 [n] -> float64 [n, 4]: left, top, width, height as fractions of the image."""
    area = 0.08 + 0.92 * uniform(hashes, _AREA)
    aspect = torch.exp((2 * uniform(hashes, _ASPECT) - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    return torch.stack([uniform(hashes, _X) * (1 - width), uniform(hashes, _Y) * (1 - height), width, height], dim=1)


def mirrored(hashes: torch.Tensor) -> torch.Tensor:
    """bool [n]: which images are mirrored."""
    return below(hashes, _FLIP, 2).bool()


def resized_crop(images: torch.Tensor, hashes: torch.Tensor) -> torch.Tensor:
    """[n, C, S, S] -> float32 [n, C, S, S]: a random box of each image at full size, mirrored at random."""
    left, top, width, height = crop_boxes(hashes).float().unbind(1)
    sign = torch.where(mirrored(hashes), -1.0, 1.0)
    zero = torch.zeros_like(left)
    theta = torch.stack([sign * width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], dim=1).view(
        -1, 2, 3
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
