"""The logits distiller in a run: its loss by hand, equal bits at any number of ranks, pruning beside it, bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_compress.distillation.methods.logits import Logits, Options
from dist_compress.distillation.term import Moment
from dist_compress.errors import UserError

QUICK = [
    "logger=none",
    "data.image_size=8",
    "data.augment=pad_crop",
    "train.exact=true",
    "train.max_steps=6",
    "train.global_batch_size=40",  # five micro-batches: no multiple of 2, 3 or 4
    "train.micro_batch_size=8",
    "train.log_every_steps=1",
    "train.eval_batch_size=90",
    "distillation.method=logits",
    "distillation.weight=0.5",
    "distillation.temperature=3.0",
    "distillation.temperature_ramp.to=1.0",
    "distillation.teacher.model.weights=given",
    "export=[]",
]


class Student(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 8, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn(self.conv(x))))))
        return self.linear(F.dropout(x.mean((2, 3)), 0.1, self.training))


class TeacherNet(nn.Module):
    """Another architecture, with what would show training mode: dropout and batch norm."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, classes)
        )

    def forward(self, x: torch.Tensor) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        return self.layers(x)


def compose(run_dir: str, *overrides: str) -> Any:
    from dist_compress import compose

    return compose.compose(compose.parse([*QUICK, *overrides, f"run_dir={run_dir}"]))


@contextmanager
def own_nets(classes: int = 10) -> Iterator[None]:
    """`models.build` makes the two nets of this file; weights of a file "given" are those they have."""
    from dist_compress import models, outcome

    def build(
        config: Any, num_classes: int, seed: int, vocab_size: int | None = None, whole: bool = False
    ) -> nn.Module:
        teacher = "teacher" in config.kwargs
        torch.manual_seed(seed + teacher)
        return TeacherNet(classes) if teacher else Student()

    def load(model: nn.Module, path: str, key: str) -> None:
        if path != "given":
            kept[1](model, path, key)

    kept = models.build, models.load_weights
    models.build, models.load_weights, outcome.LATENCY_S = build, load, 0.05
    try:
        yield
    finally:
        models.build, models.load_weights = kept


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    """Summary and metrics of a run."""
    from dist_compress import run

    Path(run_dir).mkdir(exist_ok=True)
    with own_nets():
        run.run(compose(run_dir, "+distillation.teacher.model.kwargs.teacher=1", *overrides))
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return {**json.loads((Path(run_dir) / "summary.json").read_text()), "series": [json.loads(line) for line in lines]}


def test_the_loss_by_hand():
    term = Logits("logits", Options(kind="forward"))
    g = torch.Generator().manual_seed(0)
    own, theirs = torch.randn(4, 10, generator=g), torch.randn(4, 10, generator=g)
    batch = {"targets": torch.zeros(4, dtype=torch.int64)}
    loss = term.loss(Moment(0, 2.0), batch, own, theirs)
    right = 4 * F.kl_div((own / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="sum")
    assert float(loss) == pytest.approx(float(right), rel=1e-6)


def test_tokens_that_do_not_count_and_padded_vocabularies():
    term = Logits("logits", Options(num_classes=7))
    own, theirs = torch.randn(2, 3, 9), torch.randn(2, 3, 8)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    valid = [(0, 0), (0, 2), (1, 2)]
    right = sum(F.kl_div(own[i, j, :7].log_softmax(0), theirs[i, j, :7].softmax(0), reduction="sum") for i, j in valid)
    loss = term.loss(Moment(0, 1.0), {"targets": targets}, own, theirs)
    assert float(loss) == pytest.approx(float(right), rel=1e-5)


def fingerprints(summary: dict[str, Any]) -> Any:
    parts = ("train/loss", "train/task_loss", "train/logits_loss", "distillation/temperature")
    series = [{name: line[name] for name in parts} for line in summary["series"] if "train/loss" in line]
    return summary["fingerprint/weights"], summary["accuracy/after"], series


def test_training_has_equal_bits_at_any_number_of_ranks(ranks, tmp_path):
    single = ranks(1, whole_run, str(tmp_path / "1"))[0]
    _, _, series = fingerprints(single)
    assert len(series) == 6
    for line in series:
        assert line["train/loss"] == pytest.approx(line["train/task_loss"] + line["train/logits_loss"], rel=1e-6)
        assert line["train/logits_loss"] > 0
    assert [line["distillation/temperature"] for line in series] == pytest.approx([3 - i / 3 for i in range(6)])
    for n in (2, 3, 4):
        assert fingerprints(ranks(n, whole_run, str(tmp_path / str(n)))[0]) == fingerprints(single)


def test_the_teacher_changes_the_training_and_half_precision_the_teacher(ranks, tmp_path):
    runs = {
        name: ranks(1, whole_run, str(tmp_path / name), *overrides)[0]["fingerprint/weights"]
        for name, overrides in {
            "kd": [],
            "bf16": ["distillation.teacher.precision=bf16"],
            "weak": ["distillation.weight=0.25"],
            "no task": ["distillation.task_weight=0"],
            "reverse": ["+distillation.options.kind=reverse"],
        }.items()
    }
    assert len(set(runs.values())) == len(runs)


PRUNED = [
    "pruning.method=l1_norm",
    "pruning.sparse_ratio=0.5",
    "pruning.config_list=[{op_names: [conv]}]",
    "pruning.schedule.end=3steps",
]


def test_pruning_and_distillation_in_one_loop(ranks, tmp_path):
    single = ranks(1, whole_run, str(tmp_path / "1"), *PRUNED)[0]
    assert single["params/after"] < single["params/before"] and single["verify/max_rel_diff"] <= 1e-5
    steps = [line["step"] for line in single["series"] if line.get("train/logits_loss", 0) > 0]
    assert max(steps) == 6 and min(steps) == 1  # before and after the shrink
    alone = ranks(1, whole_run, str(tmp_path / "alone"), *PRUNED, "distillation.method=null")[0]
    assert alone["fingerprint/plan"] and alone["fingerprint/weights"] != single["fingerprint/weights"]
    for n in (2, 3):
        again = ranks(n, whole_run, str(tmp_path / str(n)), *PRUNED)[0]
        assert fingerprints(again) == fingerprints(single) and again["fingerprint/plan"] == single["fingerprint/plan"]


def refused(run_dir: str, classes: int, *overrides: str) -> str:
    from dist_compress import run

    with own_nets(classes):
        try:
            run.Job(compose(run_dir, "+distillation.teacher.model.kwargs.teacher=1", *overrides))
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("classes", "override", "said"),
    [
        (7, "seed=0", "distillation.teacher: it has 7 classes, the student 10"),
        (10, "+distillation.options.kind=sideways", "distillation.options: divergence kind 'sideways': choose forward"),
        (10, "distillation.weight=0", "distillation.weight=0: the teacher changes nothing"),
        (10, "+distillation.options.gamma=1", "distillation.options.gamma: no such key"),
        (10, "distillation.method=telepathy", "distillation.method='telepathy': no such method. Available: "),
        (10, "distillation.teacher.model.weights=nowhere.pt", "distillation.teacher.model.weights='nowhere.pt'"),
        (10, "distillation.teacher.model.weights=null", "a teacher with random weights teaches noise"),
        (10, "distillation.temperature_ramp.start=2.0", "distillation.temperature_ramp.start=2.0 is no duration"),
    ],
)
def test_bad_input_is_refused_on_all_ranks(ranks, tmp_path, classes, override, said):
    for text in ranks(2, refused, str(tmp_path), classes, override):
        assert said in text, text


def test_own_loops_have_losses_of_their_own():
    import dist_compress

    model = Student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = {"distillation": {"method": "logits"}}
    with pytest.raises(UserError, match="distillation.method='logits': the losses of your loop are yours"):
        dist_compress.attach(model, optimizer, recipe, (torch.zeros(2, 3, 8, 8),), total_steps=10)
