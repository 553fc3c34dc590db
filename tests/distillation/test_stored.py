"""Runs that write a teacher store and runs that learn from it: equal bits at any number of ranks, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_compress.errors import UserError

COMMON = [
    "logger=none",
    "data.image_size=8",
    "data.augment=pad_crop",
    "train.exact=true",
    "train.global_batch_size=48",
    "train.micro_batch_size=8",
    "train.eval_batch_size=120",
    "train.log_every_steps=1",
    "export=[]",
]
LEARN = [
    *COMMON,
    "train.max_steps=12",
    "optim.lr=0.002",
    "distillation.method=logits",
    "distillation.teacher.mode=store",
]


def compose(*overrides: str) -> Any:
    from dist_compress import compose

    return compose.compose(compose.parse(list(overrides)))


def run(run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import outcome, run

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    run.run(compose(*overrides, f"run_dir={run_dir}"))
    series = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {**json.loads((Path(run_dir) / "summary.json").read_text()), "series": series}


def write(folder: Path, run_dir: Path, *overrides: str) -> list[str]:
    """What makes the store: a teacher of another seed."""
    return [str(run_dir), *COMMON, "train.max_steps=0", "seed=9", f"distillation.store.write={folder}", *overrides]


@pytest.fixture(scope="module")
def stores(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense: two views, written by three ranks; topk: its tail at temperatures 1 and 2, by one."""
    folder = tmp_path_factory.mktemp("stores")
    summary = ranks(3, run, *write(folder / "dense", folder / "a", "distillation.store.views=2"))[0]
    assert summary["teacher_store/samples"] == 2 * 1437 and summary["teacher_store/bytes"] == 2 * 1437 * 20
    keys = {"encoding": "topk_u8", "k": 4, "draws": 5, "temperatures": "[1.0,2.0]"}
    topk = [f"distillation.store.{key}={value}" for key, value in keys.items()]
    summary = ranks(1, run, *write(folder / "topk", folder / "b", *topk))[0]
    head, drawn = 2 + 4 + 4 + 4, 3 + 2  # 4 ids of 4 bits, values, two tails, bounds; 5 ids, entropy
    assert summary["teacher_store/bytes"] == 1437 * (head + 2 * drawn)
    return folder


def online(run_dir: str, seed: int, *overrides: str) -> dict[str, Any]:
    """The same teacher, asked as the training goes; its augmentation is that of the seed it was written with."""
    from dist_compress import models
    from dist_compress.training import data

    build, load, weights = models.build, data.build, models.load_weights

    def another(config: Any, num_classes: int, own: int, vocab_size: int | None = None, whole: bool = False) -> Any:
        return build(config, num_classes, 9 if config.kwargs == {"in_channels": 3} else own)

    models.build, data.build = another, lambda config, own, views=None: load(config, 9, 2)
    models.load_weights = lambda *args: None  # they are those of the seed
    keys = ["distillation.teacher.mode=online", "distillation.teacher.model.weights=given"]
    try:
        return run(run_dir, *LEARN, f"seed={seed}", *keys, *overrides)
    finally:
        models.build, data.build, models.load_weights = build, load, weights


def test_learning_from_a_store_is_learning_from_its_teacher(ranks, tmp_path, stores):
    """The bits differ by the rounding of what is stored, and by nothing else: every loss of 12 steps is close."""
    keys = ["distillation.temperature=2.0", f"distillation.teacher.store={stores / 'dense'}"]
    stored = ranks(1, run, str(tmp_path / "stored"), *LEARN, "seed=1", *keys)[0]
    here = ["distillation.temperature=2.0", "+distillation.teacher.model.kwargs.in_channels=3"]
    asked = ranks(1, online, str(tmp_path / "online"), 1, *here)[0]
    first, second = (
        torch.tensor([line["train/logits_loss"] for line in s["series"] if "train/logits_loss" in line])
        for s in (stored, asked)
    )
    assert len(first) == len(second) == 12 and float(first.min()) > 0.01
    assert torch.allclose(first[:4], second[:4], rtol=2e-4), (first, second)
    assert torch.allclose(first, second, rtol=5e-3), (first, second)
    other = ranks(1, run, str(tmp_path / "other"), *LEARN, "seed=1", *keys, "distillation.temperature=1.0")[0]
    third = torch.tensor([line["train/logits_loss"] for line in other["series"] if "train/logits_loss" in line])
    assert not torch.allclose(first, third, rtol=1e-1)  # the control


@pytest.mark.parametrize("name", ["dense", "topk"])
def test_equal_bits_at_any_number_of_ranks(ranks, tmp_path, stores, name):
    keys = ["distillation.temperature=2.0", f"distillation.teacher.store={stores / name}", "train.max_steps=6"]
    marks = {
        n: ranks(n, run, str(tmp_path / str(n)), *LEARN, *keys)[0]["fingerprint/weights"]
        for n in ((1, 2, 3, 4) if name == "dense" else (1, 3))
    }
    assert len(set(marks.values())) == 1, marks


def refused(run_dir: str, *overrides: str) -> str:
    from dist_compress import run

    try:
        run.Job(compose(*LEARN, *overrides, f"run_dir={run_dir}"))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("topk", ["distillation.temperature=3.0"], "temperature 3: the stored top-4 serves 1.0, 2.0 only"),
        ("topk", ["distillation.temperature_ramp.to=2.0"], "the stored top-4 serves 1.0, 2.0 only"),
        ("topk", ["+distillation.options.kind=reverse"], "kind='reverse': a stored top-4 serves forward alone"),
        ("dense", ["data.image_size=9"], "was written for other inputs: data was"),
        ("dense", ["data.augment=none"], "augment=pad_crop"),
        ("dense", ["model.num_classes=11"], "distillation.teacher: it has 10 classes, the student 11"),
        ("nowhere", [], "no teacher store there. Write one with +recipe=teacher_store"),
    ],
)
def test_bad_input_is_refused_on_all_ranks(ranks, tmp_path, stores, name, overrides, said):
    for text in ranks(2, refused, str(tmp_path), f"distillation.teacher.store={stores / name}", *overrides):
        assert said in text, text


def test_a_store_that_is_not_named(tmp_path):
    assert "distillation.teacher.store is not set" in refused(str(tmp_path))


def test_a_writer_refuses_what_the_classes_cannot_give(ranks, tmp_path):
    for text in ranks(2, refused_to_write, str(tmp_path / "store"), str(tmp_path / "run")):
        assert "distillation.store.k=48: there are 10 classes" in text
    assert not (tmp_path / "store").exists()


def refused_to_write(folder: str, run_dir: str) -> str:
    try:
        run(*write(Path(folder), Path(run_dir), "distillation.store.encoding=topk_u8"))
    except UserError as error:
        return str(error)
    return ""
