"""A small net, and a trainer with a quantizer around it, on the digits: what the ranks tests of quantization train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dist_compress import backends, comm
from dist_compress.config import Config, QuantizationConfig
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.quantization import Quantizer, preparing
from dist_compress.sites import Sites
from dist_compress.target import Coupling
from dist_compress.training import determinism
from dist_compress.training.data import Data
from dist_compress.training.data.digits import load
from dist_compress.training.data.split import Sample, Transform
from dist_compress.training.loop import Trainer
from dist_compress.training.task import Classification

STEPS = 4


class Net(nn.Module):
    """conv - norm - relu twice; a linear layer that only bright micro-batches go through; another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.seldom, self.linear = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = bool(x.mean() > -0.382) if not self.tracing else True
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3))
        return self.linear(self.seldom(x) if bright else x)

    tracing = False


class Silent:
    def log(self, step: int, series: dict[str, float]) -> None: ...


def made(micro: int = 8, **quantization: Any) -> tuple[Trainer, Quantizer]:
    """Not yet calibrated. Collective."""
    cfg = Config(quantization=QuantizationConfig(**quantization))
    cfg.data.image_size, cfg.train.exact, cfg.train.max_steps = 8, True, STEPS
    cfg.train.global_batch_size = 5 * 8 if micro == 8 else 3 * 12
    cfg.train.micro_batch_size = micro
    cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.kwargs = 0.05, 1e-3, {"momentum": 0.9}
    determinism.set_up(cfg.train)
    data = Data(*(p.split(cfg.data, Transform(cfg.data, cfg.seed, comm.device())) for p in load(cfg.data)))
    torch.manual_seed(3)
    model = Net()
    trainer = Trainer(
        cfg, model, data, Classification(), [], backends.build(cfg)[1], Projection(model), Silent()
    )  # fmt: skip
    quantizer = Quantizer(cfg)
    length = trainer.length
    model.tracing = True
    quantizer.attach(
        Context(
            cfg, model, trainer.projection, Coupling(), length.num_micro, STEPS, 5.0, data.example(2),
            evaluate=lambda num_samples: trainer.evaluate(Sample(data.train, num_samples, cfg.seed)),
        )
    )  # fmt: skip
    model.tracing = False
    quantizer.graph = preparing.graph(Sites(model, *data.example(2)), quantizer.parameters.values())  # as it runs
    trainer.methods = [quantizer]
    trainer.release()
    trainer.rebuild(lambda moments: moments)
    return trainer, quantizer
