"""CIFAR-10 (Krizhevsky 2009) as torchvision reads it: `data.root` holds cifar-10-batches-py. No download."""

from __future__ import annotations

import torch

from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.training.data.files import Pixels


def load(config: DataConfig) -> tuple[Pixels, Pixels]:
    """(train, eval): 50,000 and 10,000 images of 32 x 32. Local. Raises UserError naming `data.root`."""
    from torchvision.datasets import CIFAR10

    parts = []
    for train in (True, False):
        try:
            found = CIFAR10(config.root or "", train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"data.root={config.root!r}: no CIFAR-10 there ({error}). It must hold the folder "
                f"{CIFAR10.base_folder}, unpacked from {CIFAR10.filename}; nothing is downloaded."
            ) from None
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Pixels(images, torch.tensor(found.targets), 10))
    return parts[0], parts[1]
