"""Every file of quantization/methods, by itself: equal scales and weights at 1 to 4 ranks, and across a resume.

The micro-batches of a step are 5, or 3 larger ones: ranks accumulate, and some have none in the last round. One layer
is reached by some of the micro-batches only, so that some ranks never see data of it in a step.
"""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))  # also in the workers of the pool
from dist_compress import backends, comm  # noqa: E402
from dist_compress.config import Config, QuantizationConfig  # noqa: E402
from dist_compress.fingerprint import weights_fingerprint  # noqa: E402
from dist_compress.method import Context  # noqa: E402
from dist_compress.projection import Projection  # noqa: E402
from dist_compress.quantization import Quantizer, methods  # noqa: E402
from dist_compress.quantization.config_list import fake_quantize_class  # noqa: E402
from dist_compress.quantization.setting import Setting  # noqa: E402
from dist_compress.target import Coupling  # noqa: E402
from dist_compress.training import determinism  # noqa: E402
from dist_compress.training.calibration import calibrate  # noqa: E402
from dist_compress.training.data import Data  # noqa: E402
from dist_compress.training.data.digits import load  # noqa: E402
from dist_compress.training.data.split import Transform  # noqa: E402
from dist_compress.training.loop import Trainer  # noqa: E402
from dist_compress.training.task import Classification  # noqa: E402

METHODS = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
OPTIONS = {"dorefa": {"gradient_bits": 4}}
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


def made(method: str, micro: int) -> tuple[Trainer, Quantizer]:
    cfg = Config(quantization=QuantizationConfig(method=method, options=OPTIONS.get(method, {})))
    cfg.data.image_size, cfg.train.exact, cfg.train.max_steps = 8, True, STEPS
    cfg.train.global_batch_size = 5 * 8 if micro == 8 else 3 * 12
    cfg.train.micro_batch_size = micro
    cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.kwargs = 0.05, 1e-3, {"momentum": 0.9}
    determinism.set_up(cfg.train)
    data = Data(*(p.split(cfg.data, Transform(cfg.data, cfg.seed, comm.device())) for p in load(cfg.data)))
    torch.manual_seed(3)
    model = Net()
    trainer = Trainer(
        cfg, model, data, Classification(), [], backends.load("ddp")(cfg), Projection(model), Silent()
    )  # fmt: skip
    quantizer = Quantizer(cfg)
    length = trainer.length
    model.tracing = True
    quantizer.attach(
        Context(cfg, model, trainer.projection, Coupling(), length.num_micro, STEPS, 5.0, data.example(2))
    )  # fmt: skip
    model.tracing = False
    trainer.methods = [quantizer]
    trainer.rebuild(lambda moments: moments)
    return trainer, quantizer


def marks(trainer: Trainer, quantizer: Quantizer) -> list[str]:
    return [quantizer.fingerprint(), weights_fingerprint(trainer.model)]


def run(method: str, micro: int) -> tuple[list[list[str]], dict[str, float], list[int]]:
    """(fingerprints of scales and weights after calibration and after each step, loss, micro-batches that the seldom
    layer saw)."""
    trainer, quantizer = made(method, micro)
    seen: list[int] = []
    trainer.model.seldom.register_forward_pre_hook(lambda *_: seen.append(1))
    for listener, _ in quantizer.rounds():
        calibrate(trainer, listener, 3)
    quantizer.begin()
    trainer.settle()
    found = [marks(trainer, quantizer)]
    seen.clear()
    for step in range(STEPS if next(iter(quantizer.parameters.values())).trains else 0):
        trainer.train(until=step + 1)
        trainer.settle()
        found.append(marks(trainer, quantizer))
    passes = len(seen)
    quantizer.measure(*trainer.data.example(4))
    loss = trainer.evaluate()
    quantizer.fold()
    assert not [n for n, _ in trainer.model.named_parameters() if "quantizer" in n]  # nothing is left to learn
    assert abs(trainer.evaluate()["loss"] - loss["loss"]) < 1e-3  # folded, it is the same model
    return found, loss, [passes]


@pytest.mark.parametrize("method", METHODS)
def test_scales_and_weights_are_the_same_at_any_number_of_ranks(ranks, method):
    for micro in (8, 12):
        found, loss, passes = ranks(1, run, method, micro)[0]
        trained = len(found) > 1
        assert len({weights for _, weights in found}) == (STEPS + 1 if trained else 1)
        if trained:
            assert 0 < passes[0] < STEPS * (5 if micro == 8 else 3)  # it is seldom, indeed
        for size in (2, 3, 4) if micro == 8 else (2,):
            for other in ranks(size, run, method, micro):
                assert other[:2] == (found, loss), f"{size} ranks"


def stopped(method: str) -> dict[str, Any]:
    trainer, quantizer = made(method, 8)
    for listener, _ in quantizer.rounds():
        calibrate(trainer, listener, 3)
    quantizer.begin()
    trainer.train(until=2)
    trainer.settle()
    return trainer.state()


def resumed(method: str, state: dict[str, Any]) -> list[str]:
    trainer, quantizer = made(method, 8)
    trainer.load_state(state)
    trainer.train(until=STEPS)
    trainer.settle()
    return marks(trainer, quantizer)


TRAINED = [m for m in METHODS if fake_quantize_class(Setting("", "", method=m)).trains]


@pytest.mark.parametrize("method", TRAINED)
def test_a_stopped_training_goes_on_at_another_number_of_ranks(ranks, method):
    whole = ranks(1, run, method, 8)[0][0][-1]
    state = ranks(3, stopped, method)[0]
    assert ranks(2, resumed, method, state) == [whole, whole]
