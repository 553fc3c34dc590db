"""A data set in a local folder: what `datasets.Dataset.save_to_disk` wrote, or Parquet files.

The splits are called train and test or validation; of Parquet files, train*.parquet and test*.parquet (or
validation*.parquet). `data.text_column` is the text. With `data.label_column` (integers from 0, or names) it is
classified; without, it is continued, one row after another.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.training.data.text import Documents, Labelled
from dist_compress.training.data.tokenizer import tokenizer

_HELD_OUT = ("test", "validation", "val")


def load(config: DataConfig) -> tuple[Documents, Documents] | tuple[Labelled, Labelled]:
    """(train, eval). Local; every rank reads the same files. Raises UserError naming the key."""
    splits = _splits(config)
    names = ["train", next((name for name in _HELD_OUT if name in splits), "test")]
    if missing := [name for name in names if name not in splits]:
        raise UserError(
            f"data.root={config.root!r}: no split {missing[0]!r}; it has {', '.join(splits) or 'none'}. Needed are "
            "train and test (or validation)."
        )
    train, held_out = ([_text(config, row) for row in _column(config, splits[n], "text_column")] for n in names)
    tokens = tokenizer(config.tokenizer, lambda: train)
    if config.label_column is None:
        return Documents(train, tokens), Documents(held_out, tokens)
    labels = [_column(config, splits[name], "label_column") for name in names]
    numbers, num_classes = _numbered(config, labels, splits["train"].features[config.label_column])
    pairs = [list(zip(texts, own, strict=True)) for texts, own in zip((train, held_out), numbers, strict=True)]
    return Labelled(pairs[0], num_classes, tokens), Labelled(pairs[1], num_classes, tokens)


def _splits(config: DataConfig) -> dict[str, Any]:
    root = Path(config.root or "").expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={config.root!r}: there is no such folder. Give one that save_to_disk wrote.")
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise UserError(
            "data.source='hf_dataset' needs datasets, which is not installed: pip install 'dist_compress[models]'."
        ) from error
    files = {name: sorted(root.glob(f"{name}*.parquet")) for name in ("train", *_HELD_OUT)}
    try:
        if any(files.values()):
            return {name: _parquet(datasets, own) for name, own in files.items() if own}
        found = datasets.load_from_disk(str(root))
    except Exception as error:  # of many kinds: what pyarrow makes of a damaged file
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.root={config.root!r}: no data set there ({message}). Give a folder that save_to_disk wrote, or one "
            "with train.parquet and test.parquet."
        ) from None
    return dict(found) if isinstance(found, dict) else {"": found}


def _parquet(datasets: Any, files: list[Path]) -> Any:
    """In memory: `from_parquet` would write a copy to the user's cache."""
    parquet, arrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    table = arrow.concat_tables([parquet.read_table(file) for file in files])
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _column(config: DataConfig, split: Any, key: str) -> list[Any]:
    name = getattr(config, key)
    if name not in split.column_names:
        raise UserError(f"data.{key}={name!r}: no such column. There are {', '.join(split.column_names)}.")
    return list(split[name])


def _text(config: DataConfig, row: Any) -> str:
    if not isinstance(row, str):
        raise UserError(f"data.text_column={config.text_column!r} holds {type(row).__name__}, not text: {row!r:.60}.")
    return row


def _numbered(config: DataConfig, labels: list[list[Any]], feature: Any) -> tuple[list[list[int]], int]:
    """Labels from 0 for both splits, and how many classes there are."""
    found = set(labels[0]) | set(labels[1])
    said = f"data.label_column={config.label_column!r}"
    if unknown := set(labels[1]) - set(labels[0]):
        raise UserError(f"{said}: {sorted(map(str, unknown))[0]} is held out but never trained.")
    if all(isinstance(label, str) for label in found):
        number = {name: i for i, name in enumerate(sorted(found))}
        return [[number[label] for label in own] for own in labels], len(number)
    if not all(isinstance(label, int) and label >= 0 for label in found):
        strange = next(label for label in found if not isinstance(label, int) or label < 0)
        raise UserError(f"{said} holds {strange!r}: labels are whole numbers from 0, or names.")
    return labels, getattr(feature, "num_classes", None) or max(found) + 1
