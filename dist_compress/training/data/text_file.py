"""Text to be continued: a file, or a folder with train.txt and test.txt (or val.txt).

Of a single file every tenth window is held out. Without `data.root`, the file is the Python language reference that is
embedded in CPython (370 kB): real, and nothing to download.
"""

from __future__ import annotations

import os
from pathlib import Path

from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.training.data.text import Documents, python_reference, read_text
from dist_compress.training.data.tokenizer import tokenizer


def load(config: DataConfig) -> tuple[Documents, Documents]:
    """(train, eval). Local; every rank reads the same files. Raises UserError naming `data.root`."""
    root = Path(config.root or "").expanduser()
    if config.root is None or root.is_file():
        texts = [read_text(root)] if config.root else list(python_reference().values())
        tokens = tokenizer(config.tokenizer, lambda: texts)
        return Documents(texts, tokens, "train"), Documents(texts, tokens, "eval")
    if not root.is_dir():
        raise UserError(
            f"data.root={config.root!r}: there is no such file or folder. Give a text file, or a folder with train.txt "
            "and test.txt."
        )
    held_out = next((root / name for name in ("test.txt", "val.txt") if (root / name).is_file()), None)
    if not (root / "train.txt").is_file() or held_out is None:
        inside = ", ".join(sorted(os.listdir(root))[:8]) or "nothing"
        raise UserError(f"data.root={config.root!r}: needs train.txt and test.txt (or val.txt); found {inside}.")
    text = read_text(root / "train.txt")
    tokens = tokenizer(config.tokenizer, lambda: [text])
    return Documents([text], tokens), Documents([read_text(held_out)], tokens)
