"""A teacher store: any ranks write it, with any interruption, and any ranks read the same bytes for a sample."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankError

from dist_compress import comm
from dist_compress.distillation import store as storing
from dist_compress.distillation.encoding import Encoding
from dist_compress.distillation.losses import TopK
from dist_compress.distillation.store import Manifest, Origin, Store, write
from dist_compress.errors import UserError
from dist_compress.hashing import mix

SAMPLES, VIEWS, TOKENS, CLASSES, BATCH = 90, 2, 3, 150, 7
ENCODING = Encoding("topk_u8", CLASSES, 8, (1.0, 2.0), 4)
KEY = "distillation.teacher.store"


def manifest(**keys: Any) -> Manifest:
    origin = Origin("data", "size=8", "bytes", SAMPLES, VIEWS, 5, "teacher")
    return Manifest(ENCODING, Origin(**{**origin.__dict__, **keys}), BATCH)


def logits(keys: np.ndarray) -> torch.Tensor:
    """[len(keys) * TOKENS, CLASSES], of each sample its own."""
    rows = [torch.randn(TOKENS, CLASSES, generator=torch.Generator().manual_seed(int(key))) for key in keys]
    return 3 * torch.cat(rows)


def answers(ids: torch.Tensor, view: int) -> tuple[torch.Tensor, int]:
    return logits(ids.numpy() * VIEWS + view), TOKENS


def expected(key: int) -> np.ndarray:
    return ENCODING.encode(logits(np.array([key])), mix(torch.tensor([key]), torch.arange(TOKENS)))


def write_all(folder: str, **keys: Any) -> tuple[int, int]:
    return write(Path(folder), manifest(**keys), answers, part_bytes=400)  # every batch is a part


def write_until_killed(folder: str, victim: int, batches: int) -> None:
    """The process of one rank ends without a word while it writes a part."""
    count, write_bytes = 0, storing._write_bytes

    def dying(path: Path, content: bytes) -> None:
        nonlocal count
        count += path.suffix == ".idx"
        if comm.rank() == victim and count > batches:
            path.with_name(f".writing-{path.name}").write_bytes(content[: len(content) // 2])
            os._exit(9)
        write_bytes(path, content)

    storing._write_bytes = dying
    write_all(folder)


def read_shuffled(folder: str) -> dict[int, bytes]:
    """{key: bytes} of this rank's share, in another order for each number of ranks, in chunks with repetitions."""
    store = Store(Path(folder), KEY)
    order = np.random.default_rng(comm.world_size()).permutation(SAMPLES * VIEWS)[comm.rank() :: comm.world_size()]
    found = {}
    for keys in np.array_split(order, 9):
        records = store.read([*keys, keys[0]]).reshape(len(keys) + 1, TOKENS, -1)
        assert (records[0] == records[-1]).all()
        found |= {int(key): record.tobytes() for key, record in zip(keys, records, strict=False)}
    return found


def test_killed_resumed_and_read_by_any_number_of_ranks(ranks, tmp_path):
    folder = str(tmp_path / "store")
    with pytest.raises(RankError, match="exit code 9"):
        ranks(4, write_until_killed, folder, 2, 1)
    half = {path.stem: path.read_bytes() for path in Path(folder).glob("part-*.bin")}
    assert 4 <= len(half) < -(-SAMPLES // BATCH) and list(Path(folder).glob(".writing-*"))
    for text in ranks(2, why_not, folder):
        assert "its writing was interrupted" in text
    results = ranks(3, write_all, folder)
    assert results == [(SAMPLES * VIEWS, SAMPLES * VIEWS * TOKENS * ENCODING.record_bytes)] * 3
    kept = {path.stem: path.read_bytes() for path in Path(folder).glob("part-*.bin")}
    finished = [name for name in half if kept.get(name) == half[name]]
    assert len(finished) >= len(half) - 1, "what was finished is not written again"
    assert not list(Path(folder).glob(".writing-*"))
    for n in (1, 2, 3):
        shares = ranks(n, read_shuffled, folder)
        together = {key: record for share in shares for key, record in share.items()}
        assert sorted(together) == list(range(SAMPLES * VIEWS)) and sum(map(len, shares)) == SAMPLES * VIEWS
        assert all(record == expected(key).tobytes() for key, record in together.items())
    before = {path: path.stat().st_mtime_ns for path in Path(folder).glob("part-*")}
    assert ranks(2, write_all, folder)[0] == results[0]  # nothing left to do
    assert {path: path.stat().st_mtime_ns for path in Path(folder).glob("part-*")} == before


def test_what_is_read_is_what_was_said(tmp_path):
    write_all(str(tmp_path / "store"))
    store = Store(tmp_path / "store", KEY)
    known = store.encoding.decode(store.read([17, 4]), 1.0)
    assert isinstance(known, TopK)
    right = logits(np.array([17, 4])).log_softmax(1)
    assert torch.equal(known.ids[:, :8], right.topk(8, dim=1).indices)
    assert torch.allclose(known.log_probs[:, :8], right.topk(8, dim=1).values, atol=0.02)
    with pytest.raises(UserError, match="sample 90 is not in the store"):
        store.read([SAMPLES * VIEWS])


def why_not(folder: str) -> str:
    try:
        Store(Path(folder), KEY)
    except UserError as error:
        return str(error)
    return ""


def cut(folder: Path, part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-5])


def change(folder: Path, part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[11] ^= 1
    part.write_bytes(bytes(content))


def replace_index(folder: Path, part: Path) -> None:
    other = next(path for path in sorted(folder.glob("part-*.idx")) if path.stem != part.stem)
    part.with_suffix(".idx").write_bytes(other.read_bytes())


def lose(folder: Path, part: Path) -> None:
    part.unlink()


def no_manifest(folder: Path, part: Path) -> None:
    (folder / "manifest.json").unlink()


def foreign_manifest(folder: Path, part: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "shift": 0, "parts": 3}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, " bytes of "),
        (change, ".bin was changed"),
        (replace_index, ".idx was changed"),
        (lose, ".bin is missing"),
        (no_manifest, "no teacher store there. Write one with +recipe=teacher_store"),
        (foreign_manifest, "is no manifest of a teacher store"),
    ],
)
def test_damage_is_told_on_all_ranks(ranks, tmp_path, damage, said):
    folder = tmp_path / "store"
    write_all(str(folder))
    damage(folder, sorted(folder.glob("part-*.bin"))[1])
    for text in ranks(3, why_not, str(folder)):
        assert said in text, text


def refused_to_write(folder: str, **keys: Any) -> str:
    try:
        write_all(folder, **keys)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokenizer": "words"}, "tokenizer was 'bytes', now 'words'"),
        ({"teacher": "another"}, "the teacher has other weights"),
        ({"data": "other"}, "data was 'data', now 'other'"),
        ({"views": 1}, "views was 2, now 1"),
    ],
)
def test_a_store_is_not_written_on_with_something_else(tmp_path, keys, said):
    write_all(str(tmp_path / "store"))
    assert said in refused_to_write(str(tmp_path / "store"), **keys)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    assert "holds something else" in refused_to_write(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_duplicates_are_refused(tmp_path):
    folder = tmp_path / "store"
    write_all(str(folder))
    first = sorted(folder.glob("part-*.bin"))[0]
    for end in ("bin", "idx", "json"):
        (folder / f"part-copy.{end}").write_bytes(first.with_suffix(f".{end}").read_bytes())
    assert "of them distinct, not 180" in refused_to_write(str(folder))


def write_nan(folder: str) -> str:
    def some_nan(ids: torch.Tensor, view: int) -> tuple[torch.Tensor, int]:
        said, tokens = answers(ids, view)
        return (said * torch.nan if 40 in ids else said), tokens

    try:
        write(Path(folder), manifest(), some_nan)
    except UserError as error:
        return str(error)
    return ""


def test_a_teacher_that_says_nan(ranks, tmp_path):
    for text in ranks(3, write_nan, str(tmp_path / "store")):
        assert "the teacher's logits are NaN for a sample of 70 to 82" in text, text


def test_the_manifest_says_what_it_is(tmp_path):
    write_all(str(tmp_path / "store"))
    said = json.loads((tmp_path / "store" / "manifest.json").read_text())
    sizes = {"num_classes": CLASSES, "k": 8, "draws": 4}
    assert said["encoding"] == {"name": "topk_u8", "temperatures": [1.0, 2.0], **sizes}
    assert said["origin"]["tokenizer"] == "bytes" and len(said["parts"]) == len(list(tmp_path.glob("store/part-*.bin")))
