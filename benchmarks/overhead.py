"""What masks by projection cost a training step, in time and in collectives.

    python benchmarks/overhead.py [--ranks 2] [--blocks 20] [--steps 5]

Half of the single weights of every layer are masked, the dearest kind. One process trains with masks and without, in
alternating blocks of steps of one and the same model, so that whatever else the machine does falls on both; each number
is a median over blocks, on the slowest rank. Collectives are those of dist_compress in a step, with masks and without;
at the decision they are counted too. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from dist_compress import backends, comm, pruning
from dist_compress.config import load
from dist_compress.method import Context
from dist_compress.models.resnet_cifar import resnet20
from dist_compress.projection import Projection
from dist_compress.pruning import Pruner
from dist_compress.target import Coupling


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, C]
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Six layers of width 256 behind an embedding: 4.9 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(512, 256), nn.Linear(256, 512)
        self.layers = nn.Sequential(*(Layer(256, 4) for _ in range(6)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [B, T] -> [B, classes]
        return self.head(self.layers(self.embedding(tokens)).mean(1))


MODELS = {
    "resnet20": (resnet20, lambda: torch.randn(64, 3, 32, 32), 10, ["Conv2d", "Linear"]),
    "transformer": (Transformer, lambda: torch.randint(512, (16, 64)), 512, ["Linear", "Embedding"]),
}


class Run:
    """A model in training on this rank, with masks that can be left out."""

    def __init__(self, name: str) -> None:
        build, self.inputs, self.classes, types = MODELS[name]
        torch.manual_seed(0)
        self.model = build()
        config = load(
            {
                "train": {"global_batch_size": comm.world_size(), "micro_batch_size": 1},
                "pruning": {
                    "method": "l1_norm", "sparse_ratio": 0.5, "schedule": {"name": "one_shot", "start": 0, "end": 0},
                    "config_list": [{"op_types": types, "granularity": "element"}],
                },
            }
        )  # fmt: skip
        self.backend = backends.build(config)[1]
        self.projection = Projection(self.model)
        [self.pruner] = pruning.build(config)
        assert isinstance(self.pruner, Pruner)
        self.pruner.attach(Context(config, self.model, self.projection, Coupling(), comm.world_size(), 10, 10.0))
        self.wrapped = self.backend.wrap(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        comm.calls.clear()
        self.pruner.after_step(-1)
        self.at_decision = sum(comm.calls.values())

    def step(self, x: torch.Tensor, y: torch.Tensor, masked: bool) -> None:
        self.optimizer.zero_grad()
        with self.backend.sync_context(True):
            self.backend.backward(nn.functional.cross_entropy(self.wrapped(x), y), 0, True)
        self.backend.finish_gradients()
        if masked:
            self.projection.edit_gradients()
            self.projection.restore()
        self.optimizer.step()
        if masked:
            self.projection.project()

    def block(self, steps: int, masked: bool) -> tuple[float, float]:
        """(seconds a step, collectives a step), the seconds of the slowest rank."""
        (self.projection.project if masked else self.projection.restore)()
        x, y = self.inputs(), torch.randint(self.classes, (len(self.inputs()),))
        comm.barrier()
        comm.calls.clear()
        began = time.perf_counter()
        for _ in range(steps):
            self.step(x, y, masked)
        seconds = torch.tensor([time.perf_counter() - began])
        calls = sum(comm.calls.values()) / steps
        return float(comm.all_reduce(seconds, "max")) / steps, calls


def worker(blocks: int, steps: int) -> None:
    comm.init(600)
    for name in MODELS:
        run = Run(name)
        for masked in (True, False):
            run.block(2, masked)  # warm up
        found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        ratios = []
        for number in range(blocks):
            for masked in (True, False) if number % 2 else (False, True):
                found[masked].append(run.block(steps, masked))
            ratios.append(found[True][-1][0] / found[False][-1][0])
        with_masks, without = (statistics.median(t for t, _ in found[masked]) for masked in (True, False))
        if comm.rank() == 0:
            calls = [found[masked][0][1] for masked in (True, False)]
            print(
                f"| {name} | {comm.world_size()} | {1e3 * without:.1f} | {1e3 * with_masks:.1f} "
                f"| {100 * (statistics.median(ratios) - 1):.1f} % | {calls[1]:g} | {calls[0]:g} | {run.at_decision} |",
                flush=True,
            )
    comm.shutdown()


def main(ranks: int, blocks: int, steps: int) -> None:
    print(
        "| model | ranks | ms a step | with masks | more | collectives a step | with masks | at the decision |\n"
        "|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", __file__, "--worker"]
    subprocess.run([*command, str(blocks), str(steps)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), int(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        for key, value in (("ranks", 2), ("blocks", 20), ("steps", 5)):
            parser.add_argument(f"--{key}", type=int, default=value)
        given = parser.parse_args()
        main(given.ranks, given.blocks, given.steps)
