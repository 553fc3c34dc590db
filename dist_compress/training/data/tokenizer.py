"""What makes numbers of text: its bytes, the words of the training data, or a tokenizer in a folder of Hugging Face's.

Bytes are numbered as in ByT5 (Xue et al. 2022, arXiv:2105.13626): 0 fills up, 1 ends a document, 2 begins one that is
classified, and byte b is b + 3. Words are numbered alike, in alphabetical order; 3 is any word that is not known.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from dist_compress.config import ModelConfig
from dist_compress.errors import UserError

_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")  # any of them makes one
WORDS = "words"
_END, _BEGIN, _UNKNOWN = 1, 2, 3
_FIRST_BYTE = 3
_WORD = re.compile(r"\w+|[^\w\s]")  # a run of letters and digits, or a single other mark


class Tokenizer(Protocol):
    mark: str  # the same for equal tokenizers
    vocab_size: int
    pad: int

    def document(self, text: str) -> np.ndarray:
        """int32 [tokens] of a whole document, with what ends it. Local."""
        ...

    def sequence(self, text: str, length: int) -> np.ndarray:
        """int32 [at most length]: the beginning of a text, with the marks that an encoder expects. Local."""
        ...


class Bytes:
    mark, vocab_size, pad = "bytes", 256 + _FIRST_BYTE, 0

    def document(self, text: str) -> np.ndarray:
        return np.append(self.numbers(text), np.int32(_END))

    def sequence(self, text: str, length: int) -> np.ndarray:
        return np.array([_BEGIN, *self.numbers(text)[: length - 2], _END], np.int32)

    def numbers(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32) + _FIRST_BYTE


class Words(Bytes):
    """The words and marks that occur at least twice in some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in _WORD.findall(text))
        words = sorted(word for word, count in counts.items() if count > 1)
        self.number = {word: number for number, word in enumerate(words, _UNKNOWN + 1)}
        self.vocab_size = len(words) + _UNKNOWN + 1
        self.mark = _mark(words)

    def numbers(self, text: str) -> np.ndarray:
        return np.array([self.number.get(word, _UNKNOWN) for word in _WORD.findall(text)], np.int32)


class HuggingFace:
    """The tokenizer of a folder that `save_pretrained` wrote."""

    def __init__(self, folder: str, key: str) -> None:
        """`key`: where the folder is named. Raises UserError."""
        self.own = _load(folder, key)
        self.vocab_size = len(self.own)
        self.mark = _mark(sorted(self.own.get_vocab().items()))
        pads = (self.own.pad_token_id, self.own.eos_token_id, 0)
        self.pad = next(number for number in pads if number is not None)

    def document(self, text: str) -> np.ndarray:
        found = self.own(text, add_special_tokens=False, verbose=False)["input_ids"]
        end = [] if self.own.eos_token_id is None else [self.own.eos_token_id]
        return np.array([*found, *end], np.int32)

    def sequence(self, text: str, length: int) -> np.ndarray:
        return np.array(self.own(text, truncation=True, max_length=length)["input_ids"], np.int32)


def tokenizer(name: str | None, texts: Callable[[], Sequence[str]]) -> Tokenizer:
    """What `data.tokenizer` says; `texts()`: those of the training data. Local, the same on every rank. Raises
    UserError."""
    if name == WORDS:
        return Words(texts())
    return Bytes() if name is None else HuggingFace(name, "data.tokenizer")


def check_vocabulary(model: nn.Module, config: ModelConfig, split: Any, key: str) -> None:
    """Refuse a model that has no entry for some token of the data, or that came with another tokenizer. Local.

    `key`: of `config`. Nothing is checked for data without tokens or models without an embedding of them.
    """
    size = getattr(split, "vocab_size", None)
    if size is None:
        return
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore
    rows = getattr(embedding, "weight", None)
    if rows is not None and len(rows) < size:
        raise UserError(
            f"{key}: its vocabulary has {len(rows)} entries, and the tokens of the data number {size}. Both must come "
            "from one tokenizer: set data.tokenizer to the folder of the model, or take another model."
        )
    folder = Path(config.name).expanduser()
    if config.source != "hf" or config.target is not None or not any((folder / name).is_file() for name in _FILES):
        return
    mark = HuggingFace(config.name, f"{key}.name").mark
    if mark != split.tokenizer:
        raise UserError(
            f"{key}.name={config.name!r}: the tokenizer in this folder is not that of the data, so tokens would mean "
            f"something else. Set data.tokenizer={config.name}, or take a model of the same tokenizer."
        )


def _mark(vocabulary: Any) -> str:
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:32]


def _load(folder: str, key: str) -> Any:
    path = Path(folder).expanduser()
    if not any((path / name).is_file() for name in _FILES):
        raise UserError(
            f"{key}={folder!r}: no tokenizer there. Give a local folder that save_pretrained wrote, with "
            f"tokenizer.json for example, or {WORDS}; null takes bytes. Nothing is downloaded."
        )
    try:
        auto = importlib.import_module("transformers").AutoTokenizer
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}={folder!r} needs transformers, which is not installed: pip install 'dist_compress[models]'."
        ) from error
    try:
        return auto.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes it raise
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}={folder!r}: the tokenizer cannot be read ({message}).") from error
