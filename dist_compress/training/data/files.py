"""Images as files or arrays, on their way to a split: listed, decoded and brought to S x S pixels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from dist_compress import comm
from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.training.data.split import DecodedSplit, MemorySplit, Split, Transform

MEMORY_LIMIT_BYTES = 2 << 30
MARGIN = 8 / 7  # an image of another size is brought to 8/7 of the wanted side, then its centre is cut out


@dataclass
class Pixels:
    """Images that are an array already."""

    images: torch.Tensor  # uint8 [n, 3, S, S]
    targets: torch.Tensor  # int64 [n]
    num_classes: int

    def split(self, config: DataConfig, transform: Transform) -> Split:
        size = config.image_size
        images = self.images
        if images.shape[-1] != size:
            images = resize(images, size)
        return MemorySplit(images, self.targets, self.num_classes, transform)


@dataclass
class Files:
    """Images that are files. Each entry of `samples`: (path, class)."""

    samples: Sequence[tuple[str, int]]
    num_classes: int

    def split(self, config: DataConfig, transform: Transform) -> Split:
        """Collective when held in memory: rank r decodes the images r, r + N, ..."""
        size = config.image_size
        in_memory = config.in_memory
        if in_memory is None:
            fits = len(self.samples) * 3 * size * size <= MEMORY_LIMIT_BYTES
            in_memory = fits and config.augment != "random_resized_crop"  # boxes are cut from the whole image
        targets = [label for _, label in self.samples]
        if in_memory:
            images = self._decode_all(size, config.num_workers, transform.device)
            return MemorySplit(images, torch.tensor(targets), self.num_classes, transform)

        def decode(i: int, box: tuple[float, float, float, float] | None) -> torch.Tensor:
            return read_image(self.samples[i][0], size, box)

        return DecodedSplit(decode, targets, self.num_classes, transform, config.num_workers)

    def _decode_all(self, size: int, num_threads: int, device: torch.device) -> torch.Tensor:
        """uint8 [n, 3, S, S] of all images on every rank. Collective; a file that cannot be read fails every
        rank."""
        rank, ranks = comm.rank(), comm.world_size()
        own = torch.zeros(-(-len(self.samples) // ranks), 3, size, size, dtype=torch.uint8)
        failure = ""

        def fill(slot: int) -> None:
            own[slot] = read_image(self.samples[rank + slot * ranks][0], size)

        num_own = len(range(rank, len(self.samples), ranks))
        try:
            with ThreadPoolExecutor(max(num_threads, 1)) as pool:
                for _ in pool.map(fill, range(num_own)):
                    pass
        except UserError as error:
            failure = str(error)
        if failures := [text for text in comm.gather_object(failure) if text]:
            raise UserError(failures[0])
        return comm.all_gather(own.to(device)).transpose(0, 1).flatten(0, 1)[: len(self.samples)]


def read_image(path: str, size: int, box: tuple[float, float, float, float] | None = None) -> torch.Tensor:
    """uint8 [3, size, size], RGB. `box`: left, top, width, height to cut out, as fractions. Local."""
    try:
        with Image.open(path) as file:
            if box is None:
                file.draft("RGB", (size, size))  # JPEG: decode at a smaller scale where that is enough
            image = file if file.mode == "RGB" else file.convert("RGB")
            if box is not None:
                left, top, width, height = box[0] * file.width, box[1] * file.height, *box[2:]
                edges = (left, top, left + max(width * file.width, 1), top + max(height * file.height, 1))
                image = image.resize((size, size), Image.Resampling.BILINEAR, box=edges)
            elif image.size != (size, size):
                image = _centre(image, size)
            pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"data.root: the image {path} cannot be read ({error}). Replace or remove it.") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The middle square of the image, as PIL resamples it."""
    side = min(image.size)
    keep = side if side <= size else side / MARGIN  # small images are shown whole
    left, top = (image.width - keep) / 2, (image.height - keep) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + keep, top + keep))


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [n, C, H, W] -> uint8 [n, C, size, size], bilinear."""
    antialias = size < images.shape[-1]
    grown = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=antialias)
    return grown.round().clamp(0, 255).to(torch.uint8)
