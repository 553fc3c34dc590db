"""ImageNet (Russakovsky et al. 2015) as torchvision reads it: `data.root` holds train, val and meta.bin."""

from __future__ import annotations

from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.training.data.files import Files


def load(config: DataConfig) -> tuple[Files, Files]:
    """(train, eval): 1,281,167 and 50,000 files, never held in memory by default. Local."""
    from torchvision.datasets import ImageNet

    parts = []
    for split in ("train", "val"):
        try:
            found = ImageNet(config.root or "", split=split)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"data.root={config.root!r}: no ImageNet {split} split there ({error}). Unpack the archives of the "
                "ILSVRC2012 task with torchvision.datasets.ImageNet first; nothing is downloaded."
            ) from None
        parts.append(Files(found.samples, len(found.classes)))
    return parts[0], parts[1]
