"""Text on its way to a split: packed into windows of one length to be continued, or one text a sample to be labelled.

Every rank holds all tokens. A sample is always the same tokens of the same length, so its id is all that a teacher
store, a resumed run or another number of ranks has to know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_compress.calling import IGNORED
from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.training.data.split import Transform
from dist_compress.training.data.tokenizer import Tokenizer

EVERY = 10  # windows, of which one is held out where the data has no held-out part of its own


@dataclass
class Documents:
    """Text to be continued. `part`: "whole", or "train" or "eval" of text that has to be divided."""

    texts: Sequence[str]
    tokenizer: Tokenizer
    part: str = "whole"

    def split(self, config: DataConfig, transform: Transform) -> Windows:
        parts = [self.tokenizer.document(text) for text in self.texts]
        tokens = np.concatenate([np.zeros(0, np.int32), *parts])
        length = config.sequence_length
        numbers = torch.arange(max(-(-(len(tokens) - 1) // length), 0))
        held_out = numbers % EVERY == EVERY - 1
        chosen = {"whole": numbers, "train": numbers[~held_out], "eval": numbers[held_out]}[self.part]
        if not len(chosen):
            raise UserError(
                f"data.root={config.root!r}: {len(tokens)} tokens in all are too few for windows of "
                f"data.sequence_length={length}. Lower it, or give more text."
            )
        return Windows(tokens, chosen, length, self.tokenizer, transform.device)


class Windows:
    """Windows of `length` tokens, one after another: each token but the first is predicted exactly once.

    The targets are the inputs moved on by one token, so that logits and targets are aligned; what fills up the last
    window has the target IGNORED. Attention is causal, so no mask is needed.
    """

    def __init__(
        self, tokens: np.ndarray, numbers: torch.Tensor, length: int, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        """`tokens`: int32 [N]; `numbers`: int64 [n], which windows of them are the samples."""
        last = int(numbers.max()) + 1
        filled = np.full(last * length + 1, IGNORED, np.int32)
        filled[: len(tokens)] = tokens[: len(filled)]
        self.tokens = torch.from_numpy(filled).to(device)
        self.numbers, self.length = numbers, length
        self.num_samples, self.num_classes, self.vocab_size = len(numbers), tokenizer.vocab_size, tokenizer.vocab_size
        self.tokenizer, self.pad = tokenizer.mark, tokenizer.pad

    def batch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> dict[str, Any]:
        """inputs {"input_ids": int64 [n, length]}, targets int64 [n, length]."""
        device = self.tokens.device
        starts = self.numbers[torch.as_tensor(ids)].to(device) * self.length
        found = self.tokens[starts[:, None] + torch.arange(self.length + 1, device=device)].long()
        inputs, targets = found[:, :-1], found[:, 1:]
        inputs = inputs.masked_fill(inputs == IGNORED, self.pad)
        where = torch.as_tensor(ids).to(device)
        return {"inputs": {"input_ids": inputs}, "targets": targets.contiguous(), "ids": where}


@dataclass
class Labelled:
    """Texts that have a class each."""

    samples: Sequence[tuple[str, int]]
    num_classes: int
    tokenizer: Tokenizer

    def split(self, config: DataConfig, transform: Transform) -> Sequences:
        length = config.sequence_length
        tokens = np.full((len(self.samples), length), self.tokenizer.pad, np.int32)
        lengths = np.zeros(len(self.samples), np.int64)
        for row, (text, _) in enumerate(self.samples):
            found = self.tokenizer.sequence(text, length)
            tokens[row, : len(found)], lengths[row] = found, len(found)
        targets = torch.tensor([label for _, label in self.samples])
        return Sequences(tokens, lengths, targets, self.num_classes, self.tokenizer, transform.device)


class Sequences:
    """Texts cut or filled up to one length; the attention mask says which tokens are text."""

    def __init__(
        self, tokens: np.ndarray, lengths: np.ndarray, targets: torch.Tensor, num_classes: int, tokenizer: Tokenizer,
        device: torch.device,
    ) -> None:  # fmt: skip
        """`tokens`: int32 [n, length]; `lengths`, `targets`: int64 [n]."""
        self.tokens, self.lengths = torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)
        self.targets = targets.to(device)
        self.num_samples, self.num_classes = len(tokens), num_classes
        self.vocab_size, self.tokenizer = tokenizer.vocab_size, tokenizer.mark

    def batch(self, ids: torch.Tensor, epoch: torch.Tensor | int | None) -> dict[str, Any]:
        """inputs {"input_ids", "attention_mask": int64 [n, length]}, targets int64 [n]."""
        where = torch.as_tensor(ids).to(self.tokens.device)
        tokens = self.tokens[where].long()
        mask = torch.arange(tokens.shape[1], device=tokens.device) < self.lengths[where][:, None]
        inputs = {"input_ids": tokens, "attention_mask": mask.long()}
        return {"inputs": inputs, "targets": self.targets[where], "ids": where}


def read_text(path: Path) -> str:
    """Local. Raises UserError naming `data.root`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.root: {path} cannot be read as text in UTF-8 ({error}). Replace or remove it.") from None


def python_reference() -> dict[str, str]:
    """{topic: text} of the Python language reference that is embedded in CPython, in alphabetical order, each
    paragraph once: where it comes first. The text changes with the version of Python."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    return {name: "\n\n".join(_new(topics[name].split("\n\n"), seen)) for name in sorted(topics)}


def _new(paragraphs: Iterable[str], seen: set[str]) -> list[str]:
    found = []
    for paragraph in paragraphs:
        core = re.sub(r"\s+", " ", paragraph).strip()
        if core and core not in seen:
            seen.add(core)
            found.append(paragraph)
    return found
