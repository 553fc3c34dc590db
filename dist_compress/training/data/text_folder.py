"""Texts with a class each: root/train/<class>/*.txt and root/test (or root/val)/<class>/*.txt.

Without `data.root`: which chapter of the Python language reference, embedded in CPython, a piece of text is from. The
classes are its eight longest chapters, cut into pieces of 160 characters, of which every fifth is held out.
"""

from __future__ import annotations

from pathlib import Path

from dist_compress.config import DataConfig
from dist_compress.training.data.image_folder import listed
from dist_compress.training.data.text import Labelled, python_reference, read_text
from dist_compress.training.data.tokenizer import tokenizer

NUM_CHAPTERS, PIECE, EVERY = 8, 160, 5


def load(config: DataConfig) -> tuple[Labelled, Labelled]:
    """(train, eval). Local; every rank reads the same files. Raises UserError naming `data.root`."""
    if config.root is None:
        (train, held_out), num_classes = _chapters(), NUM_CHAPTERS
    else:
        paths, num_classes = listed(config, (".txt",))
        train, held_out = ([(read_text(Path(path)), label) for path, label in part] for part in paths)
    tokens = tokenizer(config.tokenizer, lambda: [text for text, _ in train])
    return Labelled(train, num_classes, tokens), Labelled(held_out, num_classes, tokens)


def _chapters() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    chapters = python_reference()
    longest = sorted(sorted(chapters, key=lambda name: (-len(chapters[name]), name))[:NUM_CHAPTERS])
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for label, name in enumerate(longest):
        text = chapters[name]
        for number, start in enumerate(range(0, len(text), PIECE)):
            parts[number % EVERY == EVERY - 1].append((text[start : start + PIECE], label))
    return parts
