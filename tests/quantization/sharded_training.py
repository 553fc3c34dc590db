"""A small net in parts, a quantizer on it, and training whose gradients have equal bits however it is sharded."""

from __future__ import annotations

from typing import Any

import torch
from sharded_nets import Flat, listen, set_gradient, shard, whole
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from dist_compress import comm
from dist_compress.config import Config, QuantizationConfig
from dist_compress.layout import Layout
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.quantization import Quantizer
from dist_compress.target import Coupling

NUM_MICRO = 5


class Net(nn.Module):
    """conv - norm - relu twice, then linear layers: the last has 3 rows, so that some ranks have none of them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 7, 3, stride=2), nn.BatchNorm2d(7)
        self.up, self.down, self.head = nn.Linear(7, 48), nn.Linear(48, 10), nn.Linear(10, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if tensor.is_floating_point():
                    values = torch.randn(tensor.shape, generator=generator) * 0.3
                    tensor.copy_(values.abs() + 0.3 if name.endswith(("running_var", "bn1.weight")) else values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(F.relu(self.down(F.relu(self.up(x.mean((2, 3)))))))


def micro_batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 3, (4,), generator=generator)


class Parts:
    """A model in parts that is called as a backend would; `kind` as in `sharded_nets.shard`."""

    def __init__(self, quantizer: Quantizer, kind: str) -> None:
        self.quantizer, self.model = quantizer, quantizer.context.model
        self.projection = quantizer.context.projection
        self.layout: Layout = shard(self.model, kind, quantizer.unsharded())
        self.projection.layout = self.layout
        quantizer.context.rest, quantizer.context.evaluate = self.rest, lambda num_samples: {"loss": self.loss()}
        if isinstance(self.layout, Flat):
            self.model.register_forward_pre_hook(lambda *_: self.layout.gather())  # type: ignore[attr-defined]

    def rest(self) -> None:
        if isinstance(self.layout, Flat):
            self.layout.release()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def loss(self) -> float:
        """Of one batch, which every rank sees."""
        self.projection.project()
        x, y = micro_batch(0, 0)
        loss = F.cross_entropy(self.model.eval()(x), y)
        self.rest()
        return float(loss)

    @torch.no_grad()
    def calibrate(self, steps: int = 2) -> None:
        """Up to and with `begin`."""
        self.model.eval()
        for listener, _ in self.quantizer.rounds():
            listener.calibrating = True
            for step in range(steps):
                for micro in _micros():
                    self.model(micro_batch(step, micro % NUM_MICRO)[0])
                    if micro < NUM_MICRO:
                        listener.count_pass()
                listener.end_step()
            listener.calibrating = False
            self.rest()
        self.quantizer.begin()
        self.projection.project()

    def train(self, steps: range) -> list[dict[str, Any]]:
        """What there is after each step."""
        model, layout, projection = self.model.train(), self.layout, self.projection
        learned = {name: model.get_parameter(name) for name in self.quantizer.unsharded()}
        sizes = {name: layout.shape(name).numel() for name, _ in model.named_parameters() if name not in learned}
        heard = listen(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        found = []
        for step in steps:
            optimizer.zero_grad()
            rows = []
            for micro in _micros():
                for norm in norms:
                    norm.momentum = 0.0  # the loop keeps the statistics; here they move as below
                x, y = micro_batch(step, micro % NUM_MICRO)
                (F.cross_entropy(model(x), y, reduction="sum") / (4 * NUM_MICRO)).backward()
                self.rest()
                if micro < NUM_MICRO:
                    self.quantizer.after_backward(step, micro)
                own = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned.values()]
                rows.append(torch.cat([*(heard[name].flatten() for name in sizes), *(g.flatten() for g in own)]))
                for parameter in learned.values():
                    parameter.grad = None
            total = comm.ordered_sum(torch.stack(rows), NUM_MICRO).float()
            parts = total.split([*sizes.values(), *(p.numel() for p in learned.values())])
            for name, grad in zip(sizes, parts, strict=False):
                set_gradient(layout, name, grad.view(layout.shape(name)))
            for (name, parameter), grad in zip(learned.items(), parts[len(sizes) :], strict=True):
                parameter.grad = None if ".quantizer_weight." in name else grad.view_as(parameter).clone()
            for norm in norms:
                norm.running_var.mul_(1.1)
            self.quantizer.before_step(step)
            projection.edit_gradients()
            projection.restore()
            optimizer.step()
            self.quantizer.after_step(step)
            projection.project()
            found.append(self.state())
        return found

    def state(self) -> dict[str, Any]:
        """Fingerprint of scales and zero points, all weights as they are projected, and their latents."""
        names = [name for name, _ in Net().named_parameters()]
        weights = {name: whole(self.layout, name) for name in names}
        with self.projection.lifted():
            latents = {f"latent {name}": whole(self.layout, name) for name in names}
        return {"scales": self.quantizer.fingerprint(), **weights, **latents}


def _micros() -> range:
    size = comm.world_size()
    return range(comm.rank(), -(-NUM_MICRO // size) * size, size)


def made(
    kind: str, model: nn.Module | None = None, example: torch.Tensor | None = None,
    weights: dict[str, torch.Tensor] | None = None, **config: Any,
) -> Parts:  # fmt: skip
    """Attached to a whole model, which is sharded afterwards, as a run does it. `weights`: loaded in between."""
    quantizer = Quantizer(Config(quantization=QuantizationConfig(**config)))
    model, example = model or Net(), micro_batch(9, 9)[0][:2] if example is None else example
    quantizer.attach(
        Context(
            Config(), model, Projection(model), Coupling(), NUM_MICRO, 10, 5.0, ((example,), {}),
            evaluate=lambda num_samples: {},  # once it is sharded another one
        )
    )  # fmt: skip
    if weights is not None:
        model.load_state_dict(weights)
    return Parts(quantizer, kind)


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """Equal bits."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and x["scales"] == y["scales"] and all(torch.equal(x[n], y[n]) for n in x if n != "scales")
        for x, y in zip(a, b, strict=True)
    )
