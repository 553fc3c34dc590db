"""A teacher's answers on disk, addressed by sample, written by any number of ranks and read by any other.

    store/manifest.json    how records are encoded, what they were made from and of, and, once complete, every part
    store/part-KEY.bin     records (distillation/encoding.py), sample after sample
    store/part-KEY.idx     int64 [3, samples]: key, first record, number of records
    store/part-KEY.json    sha256 of both; written last: without it a part does not count

A key is sample id * views + view; `views` augmented versions of each sample are stored with the seed of the
augmentation, so that a student sees the same crops. A part holds whole batches of one writer, and batch j always holds
the same samples, so whoever writes it, and after however many interruptions, the bytes of a sample are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_compress import comm
from dist_compress.distillation.encoding import Bytes, Encoding
from dist_compress.errors import UserError
from dist_compress.hashing import mix

FORMAT = 1
PART_BYTES = 64 << 20
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Origin:
    """What a store was made from; what a reader has to have as well, but for the teacher."""

    data: str  # hash of the samples
    preprocessing: str  # of the settings by which they reach the model
    tokenizer: str  # of what makes tokens of text; "": none
    num_samples: int
    views: int  # augmented versions of each sample
    seed: int  # of the augmentation
    teacher: str = ""  # hash of architecture and weights

    def differences(self, other: Origin) -> list[str]:
        """What of the data differs, in words."""
        names = [name for name, value in asdict(self).items() if getattr(other, name) != value and name != "teacher"]
        return [f"{name} was {getattr(self, name)!r}, now {getattr(other, name)!r}" for name in names]


@dataclass(frozen=True)
class Manifest:
    encoding: Encoding
    origin: Origin
    batch_size: int
    parts: dict[str, dict[str, Any]] | None = None  # by name: hashes and sizes; None while it is written

    def to_json(self) -> dict[str, Any]:
        """`shift`: logits and targets are aligned, none is shifted by a token."""
        return {"format": FORMAT, "shift": 0, **asdict(self)}


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none. Local. Raises UserError for what is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT or found.pop("shift") != 0:
            raise ValueError("another format")
        encoding = Encoding(**{**found["encoding"], "temperatures": tuple(found["encoding"]["temperatures"])})
        return Manifest(encoding, Origin(**found["origin"]), found["batch_size"], found["parts"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest of a teacher store ({error}). Choose another folder.") from None


def write(
    folder: Path,
    manifest: Manifest,
    answers: Callable[[torch.Tensor, int], tuple[torch.Tensor, int]],
    part_bytes: int = PART_BYTES,
    together: bool = False,
) -> tuple[int, int]:
    """Write what is missing of a store. Collective. Returns (samples, bytes) of the complete one.

    `answers(ids, view)`: the logits of samples, [n * tokens of a sample, classes], and the number of tokens; local, or
    collective if `together`: then every rank calls it equally often, for a dummy where it has no batch left.
    Raises UserError on every rank for a folder that holds something else or whose teacher or data differ.
    """
    present = comm.on_rank0(lambda: _prepare(folder, manifest))
    writer = _Writer(folder, manifest.encoding, part_bytes)
    missing = [batch for batch in _batches(manifest) if not _holds(present, batch[0])]
    failure: Exception | None = None  # told to every rank: the others wait in `answers`, or in the collective below
    for batch, view in _asked(missing, manifest.origin.views, together):
        live = batch is not None and failure is None
        if not live and not together:
            break
        try:
            ids = torch.tensor(batch if live else missing[0])
            found = answers(ids, view)
            if live:
                writer.add((ids * manifest.origin.views + view).tolist(), *found)
                if view == manifest.origin.views - 1:  # the views of a batch lie in one part
                    writer.end_of_batch()
        except (OSError, UserError) as error:
            failure = failure or error
    try:
        if failure is None:
            writer.publish()
    except OSError as error:
        failure = error
    if told := [text for text in comm.gather_object("" if failure is None else str(failure)) if text]:
        raise UserError(f"distillation.store.write={str(folder)!r}: {told[0]}")
    return comm.on_rank0(lambda: _complete(folder, manifest))


def _asked(missing: list[list[int]], views: int, together: bool) -> Iterator[tuple[list[int] | None, int]]:
    """(batch, view) that this rank asks about; `together`: as many on every rank, with None where it has none left."""
    own, ranks = missing[comm.rank() :: comm.world_size()], comm.world_size()
    num_idle = -(-len(missing) // ranks) - len(own) if together else 0
    for batch in [*own, *[None] * num_idle]:
        for view in range(views):
            yield batch, view


def _batches(manifest: Manifest) -> Iterator[list[int]]:
    for first in range(0, manifest.origin.num_samples, manifest.batch_size):
        yield list(range(first, min(first + manifest.batch_size, manifest.origin.num_samples)))


def _holds(present: np.ndarray, sample: int) -> bool:
    place = int(np.searchsorted(present, sample))
    return place < len(present) and bool(present[place] == sample)


def _prepare(folder: Path, manifest: Manifest) -> np.ndarray:
    """Make or check the folder. Returns the sorted ids of samples that finished parts hold. Rank 0 only."""
    found = read_manifest(folder)
    if found is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"distillation.store.write={str(folder)!r} holds something else. Choose an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / MANIFEST, manifest.to_json())
        return np.zeros(0, np.int64)
    differ = found.origin.differences(manifest.origin)
    for name in ("encoding", "batch_size"):
        if getattr(found, name) != getattr(manifest, name):
            differ.append(f"{name} was {getattr(found, name)}, now {getattr(manifest, name)}")
    if found.origin.teacher != manifest.origin.teacher:
        differ.append("the teacher has other weights")
    if differ:
        raise UserError(
            f"distillation.store.write={str(folder)!r} was begun with other settings: {'; '.join(differ)}. Set them "
            "back to go on, or choose another folder."
        )
    for left_over in folder.glob(".writing-*"):
        left_over.unlink()
    keys = [_read_index(folder, name)[0] for name in _finished(folder)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *keys]) // manifest.origin.views)


def _complete(folder: Path, manifest: Manifest) -> tuple[int, int]:
    """Every sample is there once: say so in the manifest. Rank 0 only."""
    parts = _finished(folder)
    keys = np.sort(np.concatenate([_read_index(folder, name)[0] for name in parts]))
    expected = manifest.origin.num_samples * manifest.origin.views
    if len(keys) != expected or (keys != np.arange(expected)).any():
        raise UserError(f"{folder} holds {len(keys)} samples, {len(np.unique(keys))} of them distinct, not {expected}.")
    _write_json(folder / MANIFEST, Manifest(manifest.encoding, manifest.origin, manifest.batch_size, parts).to_json())
    return expected, sum(part["bytes"] for part in parts.values())


def _finished(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("part-*.json")):
        found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _read_index(folder: Path, name: str) -> np.ndarray:
    """int64 [3, samples]."""
    return np.fromfile(folder / f"{name}.idx", dtype="<i8").reshape(3, -1)


class _Writer:
    """One rank's parts. Local."""

    def __init__(self, folder: Path, encoding: Encoding, part_bytes: int) -> None:
        self.folder, self.encoding, self.part_bytes = folder, encoding, part_bytes
        self.records: list[Bytes] = []
        self.index: list[tuple[int, int, int]] = []
        self.num_records = 0

    def add(self, keys: Sequence[int], logits: torch.Tensor, num_tokens: int) -> None:
        if not bool(logits.isnan().logical_not().all()):
            raise UserError(f"the teacher's logits are NaN for a sample of {keys[0]} to {keys[-1]}. Check its weights.")
        places = torch.arange(num_tokens).repeat(len(keys))
        tokens = mix(torch.tensor(keys).repeat_interleave(num_tokens), places)
        records = self.encoding.encode(logits, tokens)
        assert records.shape == (len(keys) * num_tokens, self.encoding.record_bytes)
        self.records.append(records)
        for key in keys:
            self.index.append((key, self.num_records, num_tokens))
            self.num_records += num_tokens

    def end_of_batch(self) -> None:
        if self.num_records * self.encoding.record_bytes >= self.part_bytes:
            self.publish()

    def publish(self) -> None:
        """Write the open part and let it count."""
        if not self.index:
            return
        name = f"part-{self.index[0][0]:012d}"
        content = np.concatenate(self.records).tobytes()
        index = np.array(self.index, dtype="<i8").T.tobytes()
        for end, data in (("bin", content), ("idx", index)):
            _write_bytes(self.folder / f"{name}.{end}", data)
        facts = {
            "samples": len(self.index), "bytes": len(content),
            "bin": hashlib.sha256(content).hexdigest(), "idx": hashlib.sha256(index).hexdigest(),
        }  # fmt: skip
        _write_json(self.folder / f"{name}.json", facts)
        self.records, self.index, self.num_records = [], [], 0


class Store:
    """A complete store, open for reading by any rank in any order."""

    def __init__(self, folder: Path, key: str) -> None:
        """Collective: each rank checks the hashes of a share of the parts. `key`: names the folder in messages. Raises
        UserError on every rank for what is missing, incomplete, cut or changed."""
        self.folder = folder
        self.manifest = comm.on_rank0(lambda: _open(folder, key))
        assert self.manifest.parts is not None
        self.encoding, self.origin = self.manifest.encoding, self.manifest.origin
        names = list(self.manifest.parts)
        own = names[comm.rank() :: comm.world_size()]
        wrong = [text for name in own if (text := _wrong(folder, name, self.manifest.parts[name]))]
        if told := [text for texts in comm.gather_object(wrong) for text in texts]:
            raise UserError(f"{key}={str(folder)!r}: {'; '.join(told[:5])}. Copy it again, or write it anew.")
        indices = [_read_index(folder, name) for name in names]
        part = np.repeat(np.arange(len(names)), [index.shape[1] for index in indices])
        together = np.concatenate(indices, 1)
        order = np.argsort(together[0], kind="stable")
        self.keys, self.first, self.count = together[:, order]
        self.part = part[order]
        self.files = [
            np.memmap(folder / f"{name}.bin", np.uint8, "r").reshape(-1, self.encoding.record_bytes) for name in names
        ]

    def read(self, keys: Sequence[int]) -> Bytes:
        """[records, record_bytes] of the samples, one after another in the order of `keys`. Local. Raises UserError for
        a sample that is not there."""
        wanted = np.asarray(keys, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        if (absent := wanted[self.keys[places] != wanted]).size:
            raise UserError(f"{self.folder}: sample {absent[0] // self.origin.views} is not in the store.")
        return np.concatenate(
            [self.files[self.part[p]][self.first[p] : self.first[p] + self.count[p]] for p in places.tolist()]
        )


def _open(folder: Path, key: str) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{key}={str(folder)!r}: no teacher store there. Write one with +recipe=teacher_store.")
    if manifest.parts is None:
        raise UserError(f"{key}={str(folder)!r}: its writing was interrupted. Start the command that wrote it again.")
    return manifest


def _wrong(folder: Path, name: str, facts: dict[str, Any]) -> str:
    """What is wrong with a part; "" when nothing is."""
    for end in ("idx", "bin"):
        path = folder / f"{name}.{end}"
        if not path.is_file():
            return f"{path.name} is missing"
        if end == "bin" and path.stat().st_size != facts["bytes"]:
            return f"{path.name} has {path.stat().st_size} bytes of {facts['bytes']}"
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != facts[end]:
            return f"{path.name} was changed"
    return ""


def _write_json(path: Path, content: Any) -> None:
    _write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".writing-{path.name}")
    with open(draft, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
