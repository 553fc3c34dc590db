"""Checkpoints: torch.distributed.checkpoint for the tensors, JSON for the rest, written whole or not at all.

    run_dir/checkpoints/step_00000120/   *.distcp, .metadata   tensors, by the path of their key
                                         state.json            the nested state, tensors replaced by their
                                         path meta.json             step, phase, config, world size, hash of
                                         every file

A checkpoint is written to a folder of another name and renamed when complete. It loads at any number of
ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.training import metadata

Blank = Callable[[str, torch.Size, torch.dtype], torch.Tensor]
_TENSOR = "__tensor__"
_FREE = tuple(  # what may differ on resuming
    "run_dir data.root data.in_memory data.num_workers train.eval_batch_size "
    "train.log_every_steps train.exact backend speedup.tolerance checkpoint export logger launch".split()
)


def save(run_dir: Path, step: int, state: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
    """Write `state` (nested dicts and lists of tensors and plain values, the same on every rank) as of
    `step`.

    Collective. Removes all but the `keep` newest afterwards. Raises UserError on every rank when the folder
    cannot be written; what was there before stays.
    """
    parent = Path(run_dir) / "checkpoints"
    final, draft = parent / _name(step), parent / f".writing_step_{step:08d}"
    tree, tensors = _split(state)

    def prepare() -> None:
        with _told(run_dir, step):
            for left_over in parent.glob(".writing_*"):
                shutil.rmtree(left_over)
            draft.mkdir(parents=True)

    def publish() -> None:
        with _told(run_dir, step):
            _write(draft / "state.json", tree)
            _write(draft / "meta.json", {**meta, "step": step, "files": _digests(draft)})
            if final.exists():  # the same step again, after a shrink: two renames, so that it is never half gone
                os.replace(final, parent / f".writing_replaced_{step:08d}")
            os.replace(draft, final)
            shutil.rmtree(parent / f".writing_replaced_{step:08d}", ignore_errors=True)
            for old in _complete(parent)[: -max(keep, 1)]:
                shutil.rmtree(old, ignore_errors=True)

    comm.on_rank0(prepare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no process group": meant
        try:
            save_tensors(tensors, checkpoint_id=draft, **_group())
        except CheckpointException as error:  # the same on every rank, with what each of them met
            met = next(iter(error.failures.values()))[0]
            free_mb = shutil.disk_usage(parent).free / 1e6
            comm.on_rank0(lambda: shutil.rmtree(draft, ignore_errors=True))
            raise _unwritable(run_dir, step, f"{met}; {free_mb:.0f} MB were free") from error
    comm.on_rank0(publish)
    return final


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run as rank 0 sees it. Collective."""
    return comm.on_rank0(lambda: next(reversed(_complete(Path(run_dir) / "checkpoints")), None))


def has(run_dir: Path, step: int) -> bool:
    """Whether the newest complete checkpoint is that of `step`. Collective."""
    newest = latest(run_dir)
    return newest is not None and newest.name == _name(step)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a checkpoint, after checking that no file was cut or changed. Collective."""

    def read() -> dict[str, Any]:
        try:
            meta = json.loads((folder / "meta.json").read_text())
            found = _digests(folder)
        except (OSError, ValueError) as error:
            raise _damaged(folder, str(error)) from None
        if wrong := sorted(n for n, digest in meta["files"].items() if found.get(n) != digest):
            raise _damaged(folder, f"{', '.join(wrong)} changed or lost")
        return meta

    return comm.on_rank0(read)


def load(folder: Path, blank: Blank = lambda path, size, dtype: torch.empty(size, dtype=dtype)) -> dict[str, Any]:
    """The state given to `save`, on every rank. Collective; see `read_meta` for the check.

    `blank(path, size, dtype)`: what the tensor under that path is read into, whole and on the CPU unless said
    otherwise; of a DTensor each rank reads its part, however it was written."""
    reader = FileSystemReader(folder)
    try:
        tree = json.loads((folder / "state.json").read_text())
        metadata.check(folder)
        entries = reader.read_metadata().state_dict_metadata
        tensors = {
            name: blank(name, entry.size, entry.properties.dtype)  # type: ignore[union-attr]
            for name, entry in entries.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_tensors(tensors, storage_reader=reader, **_group())
    except (OSError, ValueError, KeyError, EOFError, CheckpointException) as error:
        raise _damaged(folder, str(error)) from error
    return _join(tree, tensors)


def check_config(folder: Path, saved: dict[str, Any], config: Config) -> None:
    """Raise UserError unless what lies in `folder` was made by `config`, but for what changes no result. Local.

    `saved`: the configuration it was made by, as plain values.
    """
    here, there = _flat(json.loads(json.dumps(asdict(config)))), _flat(saved)
    differ = [k for k in sorted(here | there) if here.get(k) != there.get(k) and not k.startswith(_FREE)]
    if differ:
        said = "; ".join(f"{k} was {there.get(k)!r}, now {here.get(k)!r}" for k in differ[:5])
        raise UserError(
            f"{folder} belongs to another configuration: {said}. Set it back to resume, or choose another run_dir to "
            "start afresh."
        )


def check_model(folder: Path, saved: dict[str, torch.Tensor], here: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Raise UserError unless the saved weights have the names, the order and the shapes of `here`, the model. Local."""
    there = [(name, tuple(t.shape)) for name, t in saved.items()]
    here = list(here)
    if there != here:
        first = next((pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]), (there[-1], here[-1]))
        raise UserError(
            f"The checkpoint {folder} holds another model: {len(there)} tensors, here {len(here)}; first difference "
            f"{first[0]} there, {first[1]} here. Choose another run_dir, or set `model` back."
        )


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{key}.{name}" if key else name).items()}


def _group() -> dict[str, Any]:
    return {"process_group": comm.object_group(), "no_dist": not comm.is_initialized()}


def _split(state: Any, path: str = "state") -> tuple[Any, dict[str, torch.Tensor]]:
    """(the nesting with tensors replaced by paths, {path: tensor})."""
    if isinstance(state, torch.Tensor):
        return {_TENSOR: path}, {path: state.detach()}
    if isinstance(state, dict | list | tuple):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        tree, tensors = {}, {}
        for key, value in pairs:
            assert isinstance(key, str | int), f"{path}: keys of a state are strings"
            tree[key], found = _split(value, f"{path}/{key}")
            tensors.update(found)
        return (tree if isinstance(state, dict) else list(tree.values())), tensors
    assert state is None or isinstance(state, bool | int | float | str), f"{path}: {type(state)} in a state"
    return state, {}


def _join(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: _join(value, tensors) for key, value in tree.items()}
    return [_join(value, tensors) for value in tree] if isinstance(tree, list) else tree


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _complete(parent: Path) -> list[Path]:
    return sorted(folder for folder in parent.glob("step_*") if (folder / "meta.json").is_file())


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file but meta.json."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != "meta.json":
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            digests[path.name] = digest.hexdigest()
    return digests


def _write(path: Path, content: Any) -> None:
    with open(path, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(
        f"The checkpoint {folder} is damaged ({why}). Remove that folder to go on from the one before it, or "
        "start with another run_dir."
    )


def _unwritable(run_dir: Path, step: int, why: object) -> UserError:
    return UserError(
        f"run_dir={str(run_dir)!r}: the checkpoint of step {step} cannot be written ({why}). "
        "Those before it are whole. Free space or choose another folder."
    )


@contextmanager
def _told(run_dir: Path, step: int) -> Iterator[None]:
    """An OSError inside becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise _unwritable(run_dir, step, error) from None
