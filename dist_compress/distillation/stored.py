"""A store as a teacher, and a model's answers on the training data into a store."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dist_compress import comm
from dist_compress.calling import call, class_name, logits
from dist_compress.config import Config, DataConfig
from dist_compress.distillation.encoding import Bytes, Encoding
from dist_compress.distillation.losses import TopK
from dist_compress.distillation.store import Manifest, Origin, Store, read_manifest, write
from dist_compress.distillation.targets import wanted
from dist_compress.errors import UserError
from dist_compress.layout import Layout
from dist_compress.parts import whole_fingerprint

KEY = "distillation.teacher.store"
_PROBES = 64  # samples whose content tells two sets of data apart
_FREE = ("root", "in_memory", "num_workers", "tokenizer")  # keys of `data` that do not change what a model sees


@dataclass(frozen=True)
class Stored:
    """What a store has of a batch."""

    records: Bytes
    encoding: Encoding
    device: torch.device

    def at(self, temperature: float) -> torch.Tensor | TopK:
        """Logits [tokens, classes] or the TopK at `temperature`, on the device of the run."""
        found = self.encoding.decode(self.records, temperature)
        return found.to(self.device)


class StoreTeacher:
    """Answers by sample id from `distillation.teacher.store`, whatever the number of ranks or the order."""

    model: nn.Module | None = None

    def __init__(self, config: Config, split: Any) -> None:
        """Collective. `split`: the training data of this run. Raises UserError where the store is of other data."""
        self.store = Store(_folder(config), KEY)
        origin = self.store.origin
        here = _origin(config.data, split, origin.views, origin.seed)
        if differ := origin.differences(here):
            raise UserError(
                f"{KEY}={config.distillation.teacher.store!r} was written for other inputs: {'; '.join(differ)}. Set "
                "data back to what the store was written with, or write one for these."
            )

    def __call__(self, batch: dict[str, Any], headless: bool = False) -> Stored:
        """`batch`: with "ids", and the "views" of samples that are stored more than once."""
        keys = batch["ids"] * self.store.origin.views + batch.get("views", 0)
        return Stored(self.store.read(keys.tolist()), self.store.encoding, comm.device())

    def note(self) -> str:
        store = self.store
        return (
            f"teacher: {len(store.keys):,} stored answers, {store.encoding.name}, {store.encoding.num_classes} classes"
        )


def stored_views(config: Config) -> tuple[int, int] | None:
    """(seed of the augmentation, number of views) of a stored teacher, which the student's data have to repeat; None
    without one. Collective. Raises UserError."""
    if not wanted(config.distillation) or config.distillation.teacher.mode != "store":
        return None
    folder = _folder(config)
    manifest = comm.on_rank0(lambda: read_manifest(folder))
    return None if manifest is None else (manifest.origin.seed, manifest.origin.views)


def write_store(config: Config, model: nn.Module, layout: Layout, split: Any, seed: int) -> dict[str, float]:
    """Do what `distillation.store` says: the answers of `model`, which may lie in parts (`layout`), to every training
    sample. Collective. `seed`: of the augmentation of `split`. Returns what to report, {} if no store is asked for.
    Raises UserError."""
    asked = config.distillation.store
    if asked.write is None:
        return {}

    @torch.no_grad()
    def answers(ids: torch.Tensor, view: int) -> tuple[torch.Tensor, int]:
        found = logits(call(model, split.batch(ids, view)["inputs"]))
        return found.flatten(0, -2), found[0].numel() // found.shape[-1]

    training = model.training
    model.eval()
    try:
        num_classes = answers(torch.tensor([0]), 0)[0].shape[1]
        encoding = Encoding.choose(asked.encoding, num_classes, asked.k, tuple(asked.temperatures), asked.draws)
        teacher = f"{class_name(model)} {whole_fingerprint(layout, model)}"
        origin = _origin(config.data, split, asked.views, seed, teacher)
        size = config.train.eval_batch_size or config.train.micro_batch_size
        folder, manifest = Path(asked.write).expanduser(), Manifest(encoding, origin, size)
        whole = all(layout.is_whole(name) for name, _ in model.named_parameters())
        samples, num_bytes = write(folder, manifest, answers, together=not whole)
    finally:
        model.train(training)
    return {"teacher_store/samples": samples, "teacher_store/bytes": num_bytes}


def _folder(config: Config) -> Path:
    folder = config.distillation.teacher.store
    if folder is None:
        raise UserError(f"distillation.teacher.mode=store, but {KEY} is not set: give the folder of a teacher store.")
    return Path(folder).expanduser()


def _origin(config: DataConfig, split: Any, views: int, seed: int, teacher: str = "") -> Origin:
    """Local, the same on every rank."""
    ids = torch.linspace(0, split.num_samples - 1, min(_PROBES, split.num_samples), dtype=torch.float64).long()
    batch = split.batch(ids, None)
    digest = hashlib.sha256(f"{split.num_samples} {split.num_classes}".encode())
    for leaf in tree_leaves((batch["inputs"], batch["targets"])):
        if isinstance(leaf, torch.Tensor):
            digest.update(leaf.detach().cpu().contiguous().numpy().tobytes())
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE and value is not None}
    said = " ".join(f"{name}={value}" for name, value in settings.items())
    tokenizer = getattr(split, "tokenizer", "")
    return Origin(digest.hexdigest()[:32], said, tokenizer, split.num_samples, views, seed, teacher)
