"""A small net and its trainer, for tests of the loop. Imported on every rank of the pool."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dist_compress import backends, comm
from dist_compress.config import Config
from dist_compress.method import Method
from dist_compress.projection import Projection
from dist_compress.training import determinism
from dist_compress.training.data import Data
from dist_compress.training.data.digits import load
from dist_compress.training.data.split import Transform
from dist_compress.training.loop import Trainer
from dist_compress.training.task import Classification


class Reporter:
    def __init__(self) -> None:
        self.series: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, series: dict[str, float]) -> None:
        self.series.append((step, series))


class Net(nn.Module):
    """Small, with what makes bits depend on the ranks: batch norm, dropout, a shared scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.dropout(F.relu(self.bn2(self.conv2(x))), 0.2, self.training)
        return self.linear(x.mean((2, 3)))


class Counter(Method):
    """Counts what it is told, and remembers the micro-batches."""

    def __init__(self) -> None:
        self.micros: list[int] = []
        self.steps = 0

    def after_backward(self, step: int, micro: int) -> None:
        self.micros.append(micro)

    def after_step(self, step: int) -> None:
        self.steps += 1

    def state_dict(self) -> dict:
        return {"steps": self.steps, "half": torch.tensor([self.steps / 2])}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        assert state["half"].item() == self.steps / 2


def config(**train: object) -> Config:
    out = Config()
    out.data.image_size = 8
    out.data.augment = "pad_crop_flip"
    out.train.exact, out.train.max_steps = True, 12
    out.train.global_batch_size, out.train.micro_batch_size = 40, 8  # M = 5: no multiple of 2, 3 or 4
    out.train.log_every_steps = 1
    out.optim.kwargs = {"momentum": 0.9, "nesterov": True}
    out.optim.weight_decay = 1e-3
    for name, value in train.items():
        setattr(out.train, name, value)
    return out


def trainer(cfg: Config, methods: list[Method] | None = None) -> Trainer:
    determinism.set_up(cfg.train)
    data = Data(*(p.split(cfg.data, Transform(cfg.data, cfg.seed, comm.device())) for p in load(cfg.data)))
    torch.manual_seed(3)
    model = Net()
    backend = backends.build(cfg)[1]
    projection = Projection(model)
    return Trainer(cfg, model, data, Classification(), methods or [], backend, projection, Reporter())


def weights(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in t.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
