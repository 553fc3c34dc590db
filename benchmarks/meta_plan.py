"""Seconds and memory of planning a model of the shape of Llama-3-8B on the meta device.

    python benchmarks/meta_plan.py

Half of the MLP units and half of the groups of attention heads (a key-value head with its query heads) of each layer
are masked. Prints a Markdown table: CPU seconds of one thread and the peak of resident memory.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dist_compress import speedup

SHAPE = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8)  # fmt: skip


def half(model: nn.Module, coupling: Any) -> dict[str, torch.Tensor]:
    """Masks without the first half of the units of each group."""
    masks: dict[str, torch.Tensor] = {}
    for group in coupling.groups:
        for member in group.members if not group.blocked else ():
            if member.role != "consumer":
                shape = model.get_parameter(member.fqn).shape
                mask = torch.ones(shape[member.dim], dtype=torch.bool)
                mask[member.index[: group.num_units // 2].flatten()] = False
                masks[member.fqn] = mask.view([-1 if d == member.dim else 1 for d in range(len(shape))])
    return masks


def main() -> None:
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    before = sum(p.numel() for p in model.parameters())
    given = speedup.capture(model, (), {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False})
    print("| phase | CPU s |\n|---|---|")

    def lap(phase: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        print(f"| {phase} | {time.process_time() - start:.2f} |")
        return result

    lap("capture", lambda: given.structure)
    coupling = lap("coupling", lambda: speedup.coupling(given))
    plan = lap("plan", lambda: speedup.plan(given, masks=half(model, coupling)))
    lap("apply", lambda: speedup.apply(model, plan))
    after = sum(p.numel() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{before / 1e9:.2f} G parameters become {after / 1e9:.2f} G; peak resident memory {peak:.2f} GB.")


if __name__ == "__main__":
    main()
