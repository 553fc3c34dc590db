"""A student and a teacher of other widths, a distiller attached to them, and runs of both on digits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from whole_runs import killed_at

from dist_compress.config import load
from dist_compress.distillation.distiller import Distiller
from dist_compress.distillation.teacher import OnlineTeacher
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.target import Coupling

NUM_MICRO = 5


@dataclass
class Answer:
    """What `pair` returns: a dataclass with a tuple in it."""

    logits: torch.Tensor
    both: tuple[torch.Tensor, torch.Tensor]


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(x, (x * 2, x * 3))


class Student(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer2 = nn.Conv2d(width, 6, 3, stride=2, padding=1)
        self.pair = Pair()
        self.head = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.layer1(x)), inplace=True)
        x = F.relu(self.layer2(x), inplace=True).mean((2, 3))
        return self.head(self.pair(x).logits)


class TeacherNet(Student):
    def __init__(self, classes: int = 10) -> None:
        super().__init__(width=8)
        self.extra = nn.Conv2d(6, 6, 3, padding=1)
        self.wide = nn.Linear(6, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.layer1(x)), inplace=True)
        x = self.extra(F.relu(self.layer2(x), inplace=True)).mean((2, 3))
        self.wide(x)
        return self.head(self.pair(x).logits)


def images(n: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def attach(entries: list[dict[str, Any]], **keys: Any) -> tuple[Distiller, Student, TeacherNet]:
    """A distiller on a new pair of nets. Raises UserError."""
    torch.manual_seed(0)
    student, teacher = Student(), TeacherNet()
    section = {"config_list": entries, **keys}
    distiller = Distiller(config := load({"distillation": section}), OnlineTeacher(teacher))
    example = ((images(2),), {})
    distiller.attach(Context(config, student, Projection(student), Coupling(), NUM_MICRO, 10, 5.0, example))
    return distiller, student, teacher


def losses(distiller: Distiller, student: nn.Module, n: int = 8) -> dict[str, torch.Tensor]:
    """Of one micro-batch."""
    batch = {"inputs": images(n), "targets": torch.zeros(n, dtype=torch.int64)}
    return distiller.loss(0, batch, student(batch["inputs"]))


def hidden(model: nn.Module, module: str, n: int = 8) -> torch.Tensor:
    """What a module puts out in the same forward pass, in the mode the model is in."""
    found = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, a, out: found.append(out.clone()))
    model(images(n))
    handle.remove()
    return found[0]


@contextmanager
def own_nets() -> Iterator[None]:
    """`models.build` makes the nets of this file; weights of a file "given" are those they have."""
    from dist_compress import models, outcome

    def build(
        config: Any, num_classes: int, seed: int, vocab_size: int | None = None, whole: bool = False
    ) -> nn.Module:
        torch.manual_seed(seed + 1)
        return TeacherNet() if "teacher" in config.kwargs else Student(8)

    def load(model: nn.Module, path: str, key: str) -> None:
        assert path == "given" and key == "distillation.teacher.model.weights"

    kept = models.build, models.load_weights
    models.build, models.load_weights, outcome.LATENCY_S = build, load, 0.05
    try:
        yield
    finally:
        models.build, models.load_weights = kept


RUN = [
    "logger=none",
    "data.image_size=8",
    "data.augment=pad_crop",
    "train.exact=true",
    "train.max_steps=10",
    "train.global_batch_size=40",  # five micro-batches: no multiple of 2, 3 or 4
    "train.micro_batch_size=8",
    "train.log_every_steps=1",
    "train.eval_batch_size=90",
    "optim.lr=0.02",
    "+distillation.teacher.model.kwargs.teacher=1",
    "distillation.teacher.model.weights=given",
    "export=[]",
]


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    """Summary and metrics of a run."""
    from dist_compress import compose, run

    Path(run_dir).mkdir(exist_ok=True)
    with own_nets():
        run.run(compose.compose(compose.parse([*RUN, *overrides, f"run_dir={run_dir}"])))
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return {**json.loads((Path(run_dir) / "summary.json").read_text()), "series": [json.loads(line) for line in lines]}


def killed_run(run_dir: str, step: int, *overrides: str) -> None:
    with killed_at(step):
        whole_run(run_dir, *overrides)


def hidden_series(summary: dict[str, Any]) -> list[dict[str, float]]:
    """The losses of every step."""
    wanted = [{k: v for k, v in line.items() if k.endswith("_loss")} for line in summary["series"]]
    return [line for line in wanted if line]
