"""A checkpoint that somebody has put code into is refused before torch unpickles it."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from dist_compress.errors import UserError
from dist_compress.training import checkpoint


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_run_writes_is_read(tmp_path, dtype):
    full, none, scalar = torch.ones(3, dtype=dtype), torch.zeros(0, dtype=dtype), torch.ones((), dtype=dtype)
    state = {"full": full, "none": none, "scalar": scalar}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 3, state, {}, 2))
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_code_is_refused_and_does_not_run(tmp_path):
    folder = checkpoint.save(tmp_path, 3, {"a": torch.ones(3)}, {}, 2)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"] = checkpoint._digests(folder)  # as whoever puts code there would
    (folder / "meta.json").write_text(json.dumps(meta))
    checkpoint.read_meta(folder)
    with pytest.raises(UserError, match=r"damaged.*posix\.mkdir"):
        checkpoint.load(folder)
    assert not (tmp_path / "ran").exists()
