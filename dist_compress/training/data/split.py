"""One split of a data set, read by sample id: held in memory as uint8, or decoded when asked for.

The interface of a split, also of a user's own: `num_samples`, `num_classes` and `batch(ids, epoch)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from dist_compress.config import DataConfig
from dist_compress.hashing import mix, seed_of
from dist_compress.training.data import augment

MAX_AHEAD = 4  # batches
_SAMPLE = 0x5A3  # purpose of the seed
_AUGMENTATION = 0xA06  # purpose: keeps these hashes apart from those of other uses of the seed


class Split(Protocol):
    num_samples: int
    num_classes: int

    def batch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> dict[str, Any]:
        """`ids`: int64 [n] on the CPU; `epoch`: of each sample, None for evaluation (no augmentation). Local.

        Returns at least {"inputs": float [n, ...] (or a dict of keyword arguments), "targets": int64 [n],
        "ids": int64 [n]} on the device of the run, a pure function of the arguments.
        """
        ...


def prefetch(split: Split, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> None:
    """Tell a split that can read ahead what will be asked for soon; ids past its end are nothing. Local."""
    start = getattr(split, "prefetch", None)
    if start is not None and (ids < split.num_samples).all():
        start(ids, epoch)


class Views:
    """A split whose augmentation repeats after `count` epochs, so that each sample comes in `count` versions. Batches
    for training say which: "views", int64 [n]."""

    def __init__(self, split: Split, count: int) -> None:
        self.split, self.count = split, count
        self.num_samples, self.num_classes = split.num_samples, split.num_classes
        self.vocab_size = getattr(split, "vocab_size", None)
        self.tokenizer = getattr(split, "tokenizer", "")

    def batch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> dict[str, Any]:
        if epoch is None:
            return self.split.batch(ids, None)
        views = torch.as_tensor(epoch).expand(len(ids)) % self.count
        batch = self.split.batch(ids, views)
        return {**batch, "views": views.to(batch["ids"].device)}

    def prefetch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> None:
        views = None if epoch is None else torch.as_tensor(epoch).expand(len(ids)) % self.count
        prefetch(self.split, ids, views)


class Transform:
    """What lies between stored pixels and the model: augmentation and normalisation."""

    def __init__(self, config: DataConfig, seed: int, device: torch.device) -> None:
        self.augment, self.seed, self.device = config.augment, seed, device
        self.mean = torch.tensor(config.mean, device=device).view(1, -1, 1, 1) * 255.0
        self.scale = 1.0 / (torch.tensor(config.std, device=device).view(1, -1, 1, 1) * 255.0)

    def hashes(self, ids: torch.Tensor, epoch: torch.Tensor | int) -> torch.Tensor:
        """int64 [n] on the CPU: what every random draw for a sample in an epoch comes from."""
        return mix(self.seed, _AUGMENTATION, epoch, ids)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, S, S] in 0..255 -> float32."""
        return (images.float() - self.mean) * self.scale


class MemorySplit:
    """uint8 images on the device of the run, augmented there: what makes small images fast."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, num_classes: int, transform: Transform) -> None:
        """`images`: uint8 [n, 3, S, S]; `targets`: int64 [n]."""
        self.images, self.targets = images.to(transform.device), targets.to(transform.device)
        self.num_samples, self.num_classes, self.transform = len(images), num_classes, transform

    def batch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> dict[str, Any]:
        ids = torch.as_tensor(ids)
        where = ids.to(self.images.device)
        images, kind = self.images[where], self.transform.augment
        if epoch is not None and kind != "none":
            hashes = self.transform.hashes(ids, epoch).to(images.device)
            if kind == "random_resized_crop":
                images = augment.resized_crop(images, hashes)
            else:
                images = augment.pad_crop(images, hashes, flip=kind == "pad_crop_flip")
        return {"inputs": self.transform.normalise(images), "targets": self.targets[where], "ids": where}


class Sample:
    """Some samples of another split, drawn by the seed, in a fixed order."""

    def __init__(self, split: Split, num_samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed_of(seed, _SAMPLE))
        self.split, self.num_classes = split, split.num_classes
        self.ids = torch.randperm(split.num_samples, generator=generator)[:num_samples]
        self.num_samples = len(self.ids)

    def prefetch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> None:
        prefetch(self.split, self.ids[ids], epoch)

    def batch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> dict[str, Any]:
        return self.split.batch(self.ids[ids], epoch)


Decode = Callable[[int, "tuple[float, float, float, float] | None"], torch.Tensor]


class DecodedSplit:
    """Images decoded by a pool of threads (the decoder lets go of the interpreter), ahead of time when
    told."""

    def __init__(
        self, decode: Decode, targets: Sequence[int], num_classes: int, transform: Transform, num_threads: int
    ) -> None:
        """`decode(id, box)`: uint8 [3, S, S] of the whole image, or of a box as fractions of it."""
        self.decode, self.targets, self.transform = decode, torch.tensor(targets), transform
        self.num_samples, self.num_classes = len(targets), num_classes
        self.pool = ThreadPoolExecutor(max(num_threads, 1))
        self.ahead: dict[tuple, list[Future[torch.Tensor]]] = {}

    def prefetch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> None:
        """Start decoding a batch that will be asked for soon. Local."""
        key = self._key(ids, epoch)
        if key not in self.ahead:
            self.ahead[key] = self._start(ids, epoch)
        while len(self.ahead) > MAX_AHEAD:  # what was announced and never asked for
            self.ahead.pop(next(iter(self.ahead)))

    def batch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> dict[str, Any]:
        futures = self.ahead.pop(self._key(ids, epoch), None) or self._start(ids, epoch)
        device, kind = self.transform.device, self.transform.augment
        images = torch.stack([f.result() for f in futures]).to(device, non_blocking=True)
        if epoch is not None and kind != "none":
            hashes = self.transform.hashes(ids, epoch).to(device)
            if kind == "random_resized_crop":
                images = torch.where(augment.mirrored(hashes)[:, None, None, None], images.flip(3), images)
            else:
                images = augment.pad_crop(images, hashes, flip=kind == "pad_crop_flip")
        return {
            "inputs": self.transform.normalise(images),
            "targets": self.targets[ids].to(device),
            "ids": ids.to(device),
        }

    def _start(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> list[Future[torch.Tensor]]:
        boxes: list[Any] = [None] * len(ids)
        if epoch is not None and self.transform.augment == "random_resized_crop":
            boxes = [tuple(box) for box in augment.crop_boxes(self.transform.hashes(ids, epoch)).tolist()]
        return [self.pool.submit(self.decode, i, box) for i, box in zip(ids.tolist(), boxes, strict=True)]

    @staticmethod
    def _key(ids: torch.Tensor, epoch: torch.Tensor | int | None) -> tuple:
        return (*ids.tolist(), None if epoch is None else str(torch.as_tensor(epoch).tolist()))
