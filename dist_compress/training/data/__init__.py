"""The data of a run: a training and an evaluation split, read by sample id. A new source is one file here.

A source's file has `load(config) -> (train, eval)`, each a `files.Pixels`, `files.Files`, `text.Documents` or
`text.Labelled`; a user's own (`data._target_`) is a callable that returns an object with `train` and `eval`, each a
`split.Split`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from dist_compress import comm
from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.training.data import augment
from dist_compress.training.data.split import Split, Transform, Views
from dist_compress.training.instantiate import instantiate

SOURCES = ("digits", "image_folder", "cifar10", "imagenet", "text_file", "text_folder", "hf_dataset")
EMBEDDED = ("digits", "text_file", "text_folder")  # need no root
TEXT = ("text_file", "text_folder", "hf_dataset")


class Data:
    """Both splits. `eval` is held out: nothing is chosen on it."""

    def __init__(self, train: Split, eval: Split) -> None:
        self.train, self.eval = train, eval
        self.num_classes = train.num_classes
        self.vocab_size: int | None = getattr(train, "vocab_size", None)  # of text: tokens are numbers below it

    def example(self, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a call of the model with n evaluation samples, for tracing and checks. Local.

        The same on every rank; spread over the split, which may be sorted by class. Samples repeat when there are fewer
        than n.
        """
        num_samples = self.eval.num_samples
        inputs = self.eval.batch(torch.arange(n) * max(num_samples // n, 1) % num_samples, None)["inputs"]
        return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


def build(config: DataConfig, seed: int, views: int | None = None) -> Data:
    """The data of the run on `comm.device()`. Collective: each rank decodes a part of what is held in memory.

    `seed`: of the augmentation. `views`: see `split.Views`; None: every epoch has an augmentation of its own.
    Raises UserError naming the key (`data.root`, `data.source`, ...) for whatever cannot be read.
    """
    if config.target is not None:
        own = instantiate(config.target, "data")
        for name in ("train", "eval"):
            if not all(hasattr(getattr(own, name, None), a) for a in ("num_samples", "num_classes", "batch")):
                raise UserError(
                    f"data._target_={config.target['_target_']!r}: the object needs `train` and `eval`, each with "
                    f"num_samples, num_classes and batch(ids, epoch); `{name}` lacks one. See training/data/split.py."
                )
        data = own if hasattr(own, "example") else Data(own.train, own.eval)
    else:
        _check(config)
        source = importlib.import_module(f"{__name__}.{config.source}")
        transform = Transform(config, seed, comm.device())
        train, held_out = (found.split(config, transform) for found in source.load(config))
        data = Data(train, held_out)
    if views is not None:
        data.train = Views(data.train, views)
    if min(data.train.num_samples, data.eval.num_samples) < comm.world_size():
        raise UserError(
            f"data.source={config.source!r}, data.root={config.root!r}: {data.train.num_samples} training and "
            f"{data.eval.num_samples} evaluation samples for world size {comm.world_size()}: fewer samples than ranks. "
            "Start fewer ranks (--nproc-per-node) or use more data."
        )
    return data


def _check(config: DataConfig) -> None:
    if config.source not in SOURCES:
        raise UserError(f"data.source={config.source!r}: choose from {', '.join(SOURCES)}, or give data._target_.")
    if config.augment not in augment.CHOICES:
        raise UserError(f"data.augment={config.augment!r}: choose from {', '.join(augment.CHOICES)}.")
    if config.image_size < 1:
        raise UserError(f"data.image_size={config.image_size}: give the side of the images in pixels, at least 1.")
    for key, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (1, 3) or key == "std" and min(values) <= 0:
            raise UserError(
                f"data.{key}={values}: give one number, or three for red, green and blue"
                f"{', above 0' if key == 'std' else ''}, for pixels in 0..1."
            )
    if config.source not in EMBEDDED and config.root is None:
        raise UserError(f"data.root is not set, and data.source={config.source!r} reads files: give their folder.")
    if config.source in TEXT and config.augment != "none":
        raise UserError(f"data.augment={config.augment!r}: text is not augmented. Set data.augment=none.")
