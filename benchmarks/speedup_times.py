"""CPU seconds of capturing and of shrinking, beside one forward pass and the limits we hold ourselves to.

    python benchmarks/speedup_times.py

One thread, process time, the smaller of three runs in one process after a first forward pass. `trace`: the tape of
operators that planning reads; `concrete_trace`: the graph. Both have 3 forward passes + 0.2 s. `shrink`: capture, plan
with half of the units of every free group masked, and apply, verification included. Prints a Markdown table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import transformers
from torch import nn

from dist_compress import speedup
from dist_compress.tracing import trace

LLAMA = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, float]] = {  # builder, args and kwargs, limit of the shrink
    "resnet50, 64x64": (torchvision.models.resnet50, ((torch.randn(1, 3, 64, 64),), {}), 0.9),
    "vit_b_16, 224x224": (torchvision.models.vit_b_16, ((torch.randn(1, 3, 224, 224),), {}), 1.9),
    "Llama, 2 layers of 64": (
        lambda: transformers.LlamaForCausalLM(LLAMA),
        ((), {"input_ids": torch.arange(16)[None], "use_cache": False}),
        0.15,
    ),
}


def seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def shrink(model: nn.Module, args: Any, kwargs: Any) -> None:
    speedup.apply(model, speedup.plan(speedup.capture(model, args, kwargs)))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"| model | forward | trace | concrete_trace | limit of both | shrink | its limit |\n{'|---' * 7}|")
    for name, (build, (args, kwargs), limit) in MODELS.items():
        model = build().eval()
        for parameter in model.parameters():  # what starts at zero would be dead with all that comes before it
            if not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            model(*args, **kwargs)
            forward = seconds(lambda: model(*args, **kwargs))  # noqa: B023
        tape = seconds(lambda: trace(model, args, kwargs))  # noqa: B023
        graph = seconds(lambda: speedup.concrete_trace(model, args, kwargs))  # noqa: B023
        for group in speedup.coupling(model, args, kwargs).groups:
            if not group.blocked:
                speedup.mask_units(model, group, torch.arange(group.num_units // 2))
        copies = [build().eval() for _ in range(3)]
        for copy in copies:
            copy.load_state_dict(model.state_dict())
        took = seconds(lambda: shrink(copies.pop(), args, kwargs))  # noqa: B023
        cells = (forward, tape, graph, 3 * forward + 0.2, took, limit)
        print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
