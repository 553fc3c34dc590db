"""Checkpoints: what goes in comes out at any number of ranks; a kill leaves the old one; damage is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.training import checkpoint


def state() -> dict[str, Any]:
    return {
        "step": 3,
        "model": {"conv.weight": torch.arange(24.0).view(2, 3, 4), "count": torch.tensor(7), "none": torch.ones(0, 2)},
        "optim": {"conv.weight": {"momentum_buffer": torch.full((2, 3, 4), 0.1), "step": 2.0, "empty": None}},
        "methods": [{"mask": torch.tensor([True, False]), "ratio": 0.1 + 0.2, "names": ["a", "b"]}, {}],
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        checkpoint.save(folder, step, state(), {"phase": "train", "step": step}, keep)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    newest = checkpoint.latest(folder)
    assert newest is not None
    return checkpoint.load(newest), checkpoint.read_meta(newest)


def test_what_was_saved_on_two_ranks_loads_on_any_number(ranks, tmp_path):
    ranks(2, save, tmp_path, 3)
    for n in (1, 2, 3):
        for loaded, meta in ranks(n, load, tmp_path):
            assert equal(loaded, state()) and meta["step"] == 3 and meta["phase"] == "train"


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 10, 9)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000009", "step_00000010"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000010"
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_the_same_step_can_be_written_again(tmp_path):
    save(tmp_path, 4)
    checkpoint.save(tmp_path, 4, {"other": 1}, {"phase": "fine-tune"}, 2)
    loaded, meta = load(tmp_path)
    assert loaded == {"other": 1} and meta["phase"] == "fine-tune"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]


def test_a_kill_before_the_rename_leaves_the_old_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        save(tmp_path, 2)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step_00000001" and equal(load(tmp_path)[0], state())
    save(tmp_path, 2)  # and what was left lying about is gone
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]


def damage(newest: Path, how: str) -> None:
    data = next(newest.glob("*.distcp"))
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "one bit":
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 1
        data.write_bytes(bytes(raw))
    elif how == "lost":
        data.unlink()
    elif how == "meta":
        (newest / "meta.json").write_text("{")


@pytest.mark.parametrize("how", ["truncated", "one bit", "lost", "meta"])
def test_damage_is_an_error_that_names_the_folder(tmp_path, how):
    save(tmp_path, 5)
    newest = tmp_path / "checkpoints" / "step_00000005"
    damage(newest, how)
    with pytest.raises(UserError, match=r"step_00000005 is damaged .*Remove that folder"):
        checkpoint.read_meta(newest)


def refused(folder: Path) -> str:
    try:
        save(folder, 1)
    except UserError as error:
        return str(error)
    return f"rank {comm.rank()} saw nothing"


def test_a_folder_that_cannot_be_written_is_told_on_every_rank(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    for text in ranks(2, refused, tmp_path / "file"):
        assert text.startswith("run_dir=") and "step 1 cannot be written" in text


def test_another_configuration_is_refused_by_the_keys_that_differ(tmp_path):
    from dataclasses import asdict

    config = Config()
    meta = {"config": asdict(config)}
    config.run_dir, config.data.root, config.train.log_every_steps = "elsewhere", "/moved", 1
    checkpoint.check_config(tmp_path, meta["config"], config)
    config.optim.lr, config.pruning.config_list = 0.5, [{"op_types": ["Conv2d"]}]
    with pytest.raises(UserError, match=r"optim\.lr was 0\.1, now 0\.5; pruning\.config_list was \[\], now"):
        checkpoint.check_config(tmp_path, meta["config"], config)


def test_another_model_is_refused_with_the_first_difference(tmp_path):
    saved = nn.Linear(3, 2).state_dict()
    checkpoint.check_model(tmp_path, saved, [("weight", (2, 3)), ("bias", (2,))])
    with pytest.raises(UserError, match=r"\('weight', \(2, 3\)\) there, \('weight', \(2, 4\)\) here"):
        checkpoint.check_model(tmp_path, saved, [("weight", (2, 4)), ("bias", (2,))])
