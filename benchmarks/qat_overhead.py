"""What quantization-aware training costs a step, beside torchao on the same model.

    python benchmarks/qat_overhead.py [--blocks 12] [--steps 2]

One process and one thread. Plain steps, those of dist_compress and those of torchao (pip install torchao) alternate in
blocks, so that whatever else the machine does falls on all; ratios are medians over blocks. resnet20: torchao's PT2E
QAT with the X86InductorQuantizer, which observes inputs and outputs of layers; so dist_compress does it once with the
inputs alone, its default, and once with the outputs, too. Transformer: int8 inputs by token, int8 weights by channel.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchao
from overhead import Transformer
from torch import nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from dist_compress import comm, quantization
from dist_compress.config import load
from dist_compress.method import Context
from dist_compress.models.resnet_cifar import resnet20
from dist_compress.projection import Projection
from dist_compress.target import Coupling

Step = Callable[[], None]
EVERYTHING = {"_input_0": {}, "weight": {}, "_output_0": {}}
BY_TOKEN = {"_input_0": {"quant_dtype": "int8", "granularity": "per_token"}, "weight": {}}


def plain(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[Step, int]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, 0


def ours(model: nn.Module, x: torch.Tensor, y: torch.Tensor, defaults: dict[str, Any]) -> tuple[Step, int]:
    """The hooks that the loop calls, in their order. Also the number of tensors that are quantized."""
    config = load(
        {
            "train": {"global_batch_size": len(x), "micro_batch_size": len(x)},
            "quantization": {"method": "qat", "default_settings": defaults},
        }
    )
    projection = Projection(model)
    [quantizer] = quantization.build(config)
    assert isinstance(quantizer, quantization.Quantizer)
    quantizer.attach(Context(config, model, projection, Coupling(), 1, 10**6, 1e6, ((x[:2],), {})))
    quantizer.observed.calibrating = True
    model.eval()(x)
    quantizer.observed.count_pass()
    quantizer.observed.end_step()
    quantizer.observed.calibrating = False
    quantizer.begin()
    model.train()
    projection.project()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        quantizer.after_backward(0, 0)
        quantizer.before_step(0)
        projection.edit_gradients()
        projection.restore()
        optimizer.step()
        quantizer.after_step(0)
        projection.project()

    return step, len(quantizer.activations) + len(quantizer.parameters)


def pt2e(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[Step, int]:
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    torchao.quantization.pt2e.move_exported_model_to_train(prepared)
    return plain(prepared, x, y)[0], sum(isinstance(m, FakeQuantizeBase) for m in prepared.modules())


def linear_qat(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[Step, int]:
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    wanted = QATConfig(activation_config=activation, weight_config=weight, step="prepare")
    torchao.quantization.quantize_(model, wanted)
    return plain(model, x, y)[0], 2 * sum(isinstance(m, nn.Linear) for m in model.modules())


def compare(name: str, steps: dict[str, tuple[Step, int]], blocks: int, size: int) -> None:
    def block(step: Step) -> float:
        began = time.process_time()
        for _ in range(size):
            step()
        return (time.process_time() - began) / size

    for step, _ in steps.values():
        step()
    taken: dict[str, list[float]] = {title: [] for title in steps}
    for _ in range(blocks):
        for title, (step, _) in steps.items():
            taken[title].append(block(step))
    for title, (_, number) in steps.items():
        ratio = statistics.median(t / p for t, p in zip(taken[title], taken["plain"], strict=True))
        took = 1e3 * statistics.median(taken[title])
        print(f"| {name} | {title} | {number} | {took:.0f} | {ratio:.2f} |", flush=True)


def main(blocks: int, size: int) -> None:
    torch.set_num_threads(1)
    comm.init(600)
    torch.manual_seed(0)
    print("| model | step | quantized tensors | ms | of plain |\n|---|---|---|---|---|", flush=True)
    images, labels = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (128,))
    net = resnet20().to(memory_format=torch.channels_last)
    steps = {
        "plain": plain(copy.deepcopy(net), images, labels),
        "dist_compress, inputs": ours(copy.deepcopy(net), images, labels, {}),
        "dist_compress, inputs and outputs": ours(
            copy.deepcopy(net), images, labels, {"Conv2d": EVERYTHING, "Linear": EVERYTHING}
        ),
        f"torchao {torchao.__version__}, PT2E": pt2e(copy.deepcopy(net), images, labels),
    }
    compare("resnet20", steps, blocks, size)
    tokens, labels = torch.randint(512, (16, 64)), torch.randint(512, (16,))
    former = Transformer()
    steps = {
        "plain": plain(copy.deepcopy(former), tokens, labels),
        "dist_compress": ours(copy.deepcopy(former), tokens, labels, {"Linear": BY_TOKEN}),
        f"torchao {torchao.__version__}, QATConfig": linear_qat(copy.deepcopy(former), tokens, labels),
    }
    compare("transformer", steps, blocks, size)
    comm.shutdown()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in (("blocks", 12), ("steps", 2)):
        parser.add_argument(f"--{key}", type=int, default=value)
    given = parser.parse_args()
    main(given.blocks, given.steps)
