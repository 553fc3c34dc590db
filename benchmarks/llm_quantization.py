"""Perplexity of a small Llama after quantization: rounding to the nearest, gptq, awq; ptq and smoothquant.

    python benchmarks/llm_quantization.py [--steps 800] [--size 128]

A byte-level Llama of transformers (4 layers, grouped-query attention) is trained on the help texts of Python
(pydoc_data.topics), the last tenth of which is held out. Then copies of it are quantized, all linear layers but
lm_head: weights alone in groups of 32 or by output channel, then weights by output channel and inputs by tensor. 64
sequences of the training text are for calibration. Prints a Markdown table; perplexity is by byte.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import pydoc_data.topics
import time
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from dist_compress.config import Config, QuantizationConfig
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.quantization import Quantizer
from dist_compress.target import Coupling

LENGTH, MICRO = 128, 8  # bytes of a sequence, sequences of a micro-batch
STEPS, NUM_MICRO = 4, 2  # of the calibration


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [sequences, LENGTH]: to train on, held out."""
    topics = pydoc_data.topics.topics
    raw = "\n".join(topics[key] for key in sorted(topics)).encode()
    tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    tokens = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(size: int, steps: int, train: torch.Tensor) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = loss_of(model, train[torch.randint(len(train), (16,))])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    losses = [loss_of(model, part).double() * len(part) for part in tokens.split(32)]
    return math.exp(float(sum(losses)) / len(tokens))


@torch.no_grad()
def quantized(model: Any, train: torch.Tensor, asked: dict[str, Any]) -> Any:
    """A copy that is quantized as a run would do it."""
    model = copy.deepcopy(model)
    entry: dict[str, Any] = {"op_types": ["Linear"], "exclude_op_names": ["lm_head"]}
    rest, targets = {key: value for key, value in asked.items() if key != "targets"}, asked["targets"]
    config = QuantizationConfig(**rest, config_list=[{**entry, "target_names": [*targets], "target_settings": targets}])
    quantizer = Quantizer(Config(quantization=config))
    example = (train[:2],), {"use_cache": False}
    quantizer.attach(Context(Config(), model, Projection(model), Coupling(), NUM_MICRO, 1, 1.0, example))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    for listener, _ in quantizer.rounds():
        listener.calibrating = True
        for step in range(STEPS):
            for micro in range(NUM_MICRO):
                first = (step * NUM_MICRO + micro) * MICRO
                model(train[order[first : first + MICRO]], use_cache=False)
                listener.count_pass()
            listener.end_step()
        listener.calibrating = False
    quantizer.begin()
    quantizer.fold()
    return model


def cases() -> list[tuple[str, dict[str, Any]]]:
    """(what | method, quantization.* with the targets of each layer)."""
    found: list[tuple[str, dict[str, Any]]] = []
    for granularity, dtype in itertools.product(("per_group(32)", "out_channel"), ("int4", "int3")):
        targets = {"weight": {"quant_dtype": dtype, "granularity": granularity}}
        for method, options in (
            ("round_to_nearest", {}), ("ptq", {}), ("awq", {}), ("gptq", {}), ("gptq", {"act_order": True}),
        ):  # fmt: skip
            name = f"weights {dtype}, {granularity} | {', '.join([method, *options])}"
            found.append((name, {"method": method, "options": options, "targets": targets}))
    for dtype, observer, method in itertools.product(("int8", "int6"), ("min_max", "mse"), ("ptq", "smoothquant")):
        both = {"quant_dtype": dtype, "quant_scheme": "symmetric"}
        options = {"observer": observer, "weight_observer": observer}
        case = {"method": method, "options": options, "targets": {"_input_0": both, "weight": both}}
        found.append((f"weights and inputs {dtype} | {method}, {observer}", case))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--size", type=int, default=128)
    given = parser.parse_args()
    train, held_out = texts()
    begin = time.process_time()
    model = trained(given.size, given.steps, train)
    numbers = sum(p.numel() for p in model.parameters())
    print(f"{numbers / 1e6:.2f} M parameters, trained for {time.process_time() - begin:.0f} CPU seconds\n", flush=True)
    print("| | method | perplexity | more | CPU s |\n|---|---|---|---|---|")
    dense = perplexity(model, held_out)
    print(f"| float | | {dense:.4f} | | |")
    for name, asked in cases():
        begin = time.process_time()
        small = quantized(model, train, asked)
        taken = time.process_time() - begin
        found = perplexity(small, held_out)
        print(f"| {name} | {found:.4f} | {100 * (found / dense - 1):+.2f} % | {taken:.1f} |", flush=True)


if __name__ == "__main__":
    main()
