"""Small nets and a quantizer around them, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_compress.config import Config, QuantizationConfig
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.quantization import Quantizer
from dist_compress.target import Coupling

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """conv - norm - relu, conv - norm, added; then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def net(seed: int = 0) -> Net:
    """With statistics and affine parameters that matter."""
    generator = torch.Generator().manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * 0.3
                tensor.copy_(values.abs() + 0.3 if name.endswith(("running_var", "bn1.weight")) else values)
    return model


def attached(model: nn.Module, example: Any = EXAMPLE, num_micro: int = 4, **config: Any) -> Quantizer:
    """A quantizer on `model`, not yet calibrated. `example`: an input, or (args, kwargs)."""
    call = ((example,), {}) if isinstance(example, torch.Tensor) else example
    quantizer = Quantizer(Config(quantization=QuantizationConfig(**config)))
    context = Context(
        Config(), model, Projection(model), Coupling(), num_micro, 10, 5.0, call,
    )  # fmt: skip
    quantizer.attach(context)
    context.projection.project()
    return quantizer


def calibrated(model: nn.Module, example: Any = EXAMPLE, steps: int = 2, **config: Any) -> Quantizer:
    """After `steps` steps of calibration on random batches like the example (else on it), on this rank alone."""
    quantizer = attached(model, example, **config)
    generator = torch.Generator().manual_seed(7)
    quantizer.observed.calibrating = True
    model.eval()
    with torch.no_grad():
        for _ in range(steps):
            if not isinstance(example, torch.Tensor):
                model(*example[0], **example[1])
            elif not example.is_floating_point():
                model(example)
            else:
                model(torch.randn(4, *example.shape[1:], generator=generator))
            quantizer.observed.count_pass()
            quantizer.observed.end_step()
    quantizer.observed.calibrating = False
    quantizer.begin()
    return quantizer
