"""A tree with one folder per class: root/train/<class>/*.png and root/test (or root/val)/<class>/*.png."""

from __future__ import annotations

import os
from pathlib import Path

from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.training.data.files import Files

Samples = list[tuple[str, int]]  # path, class
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def load(config: DataConfig) -> tuple[Files, Files]:
    """(train, eval). Local; every rank reads the same tree. Raises UserError naming `data.root`."""
    (train, held_out), num_classes = listed(config, EXTENSIONS)
    return Files(train, num_classes), Files(held_out, num_classes)


def listed(config: DataConfig, extensions: tuple[str, ...]) -> tuple[list[Samples], int]:
    """([train, eval], number of classes): the files of a tree with one folder per class. Local. Raises UserError naming
    `data.root`."""
    root = Path(config.root or "")
    if not root.is_dir():
        raise UserError(f"data.root={config.root!r}: there is no such folder. Give the folder that holds train/.")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        inside = ", ".join(sorted(os.listdir(root))[:8]) or "nothing"
        raise UserError(
            f"data.root={config.root!r}: needs the folders train and test (or val), each with one folder per class; "
            f"found {inside}."
        )
    classes = _classes(root / "train")
    if (other := _classes(held_out)) != classes:
        differ = sorted(set(classes) ^ set(other))
        raise UserError(
            f"data.root={config.root!r}: train has {len(classes)} classes and {held_out.name} {len(other)}; they must "
            f"be the same. Only in one of them: {', '.join(differ[:8])}."
        )
    return [_files(folder, classes, extensions) for folder in (root / "train", held_out)], len(classes)


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _files(folder: Path, classes: list[str], extensions: tuple[str, ...]) -> Samples:
    samples = []
    for label, name in enumerate(classes):
        names = sorted(e.name for e in os.scandir(folder / name) if e.name.lower().endswith(extensions))
        samples += [(os.path.join(folder, name, file), label) for file in names]
    if not samples:
        raise UserError(
            f"data.root: nothing in {folder} ({len(classes)} class folders). Expected <class>/<file> with one of "
            f"{', '.join(extensions)}."
        )
    return samples
