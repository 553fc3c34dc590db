"""What compression adds to a training step on one GPU: ResNet-50 and a Llama of about a billion parameters.

    python benchmarks/gpu_step.py [--blocks 10] [--steps 5] [--compile] [--recompute] [--small]

One process, bfloat16 by autocast, random images and bytes of text, random weights. Steps without compression and with
it (masks on half of the single weights of convolutions and linear layers, int8 weights and inputs, the loss against the
net as it was, online) alternate in blocks of two runs in one process; ratios are medians over blocks. `--compile`,
`--recompute`: both runs with train.compile, or with train.activation_checkpointing of their blocks. `--small`: sizes
for a look without a GPU, whose numbers say nothing about one. Prints a Markdown table, with the peak of memory
while both runs are held.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch

from dist_compress import comm, compose, outcome
from dist_compress.run import Job

LAST = 10_000_000
COMMON = [
    "logger=none", "export=[]", "train.exact=false", "train.precision=bf16", f"train.max_steps={LAST}",
    "optim.lr=0.00001",
    f"train.log_every_steps={LAST}", "checkpoint.every_steps=null",
]  # fmt: skip
COMPRESSED = [
    "pruning.method=l1_norm", "pruning.sparse_ratio=0.5", f"speedup.at={LAST}steps",
    "pruning.schedule={name: one_shot, start: 1steps, end: 1steps, num_decisions: 1}",
    "quantization=qat", "quantization.start=2steps", "quantization.calibration_steps=1", "quantization.freeze=1.0",
    "distillation=self", "distillation.teacher.start=1steps",
]  # fmt: skip


class Pictures:
    """Random images of random classes."""

    num_classes = 1000

    def __init__(self, size: int, num_samples: int) -> None:
        self.size, self.num_samples = size, num_samples

    def batch(self, ids: torch.Tensor, epoch: int | None) -> dict[str, torch.Tensor]:
        generator = torch.Generator(comm.device()).manual_seed(int(ids[0]))
        shape = (len(ids), 3, self.size, self.size)
        images = torch.randn(shape, generator=generator, device=comm.device())
        return {"inputs": images, "targets": ids.to(comm.device()) % self.num_classes}


def pictures(size: int) -> SimpleNamespace:
    """What `data._target_` asks for."""
    return SimpleNamespace(train=Pictures(size, 4096), eval=Pictures(size, 64))  # evaluations are not measured


def nets(small: bool) -> dict[str, tuple[list[str], str]]:
    """{name: (overrides, class of its blocks)}."""
    name, block, size, num = ("resnet18", "BasicBlock", 32, 4) if small else ("resnet50", "Bottleneck", 224, 64)
    images = [
        "model=torchvision", f"model.name={name}", "+data._target_=gpu_step.pictures", f"+data.size={size}",
        f"train.global_batch_size={num}", f"train.micro_batch_size={num}", "train.channels_last=true",
    ]  # fmt: skip
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 20, "num_attention_heads": 16}
    few, tokens, words = 8, 1024, 32000
    if small:
        sizes, few = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}, 2
        tokens, words = 32, 512
    sizes |= {"num_key_value_heads": sizes["num_attention_heads"], "max_position_embeddings": tokens}
    text = [
        "model=llama", *(f"model.kwargs.{key}={value}" for key, value in sizes.items()),
        f"+model.kwargs.vocab_size={words}", "optim=adamw", "data=text_file", "task=causal_lm",
        f"data.sequence_length={tokens}", f"train.global_batch_size={few}", f"train.micro_batch_size={few}",
    ]  # fmt: skip
    return {name: (images, block), f"llama of {sizes['num_hidden_layers']} layers": (text, "LlamaDecoderLayer")}


def masked(blocks_of: str) -> str:
    types = "Linear" if blocks_of.startswith("Llama") else "Conv2d, Linear"
    return f"pruning.config_list=[{{op_types: [{types}], granularity: element}}]"


def job_of(overrides: list[str]) -> Job:
    """A run whose first steps are done, so that everything acts."""
    job = Job(compose.compose(compose.parse([*COMMON, *overrides, f"run_dir={tempfile.mkdtemp()}"])))
    for step, event in job.events():
        if step < LAST:
            job.trainer.train(until=step)
            event()
    return job


def block(job: Job, steps: int) -> float:
    """Seconds a step."""
    finish()
    began = time.perf_counter()
    job.trainer.train(until=job.trainer.step + steps)
    finish()
    return (time.perf_counter() - began) / steps


def finish() -> None:
    if comm.device().type == "cuda":
        torch.cuda.synchronize()


def main(blocks: int, steps: int, compiled: bool, again: bool, small: bool) -> None:
    comm.init(600, "cuda" if torch.cuda.is_available() else "cpu")
    outcome.LATENCY_S = 0.05
    print(f"{torch.cuda.get_device_name() if comm.device().type == 'cuda' else 'CPU, no measurement of a GPU'}\n")
    print("| step of | parameters | ms | ms compressed | ratio | peak, GiB |\n|---|---|---|---|---|---|", flush=True)
    for name, (overrides, blocks_of) in nets(small).items():
        both = [*overrides, f"train.compile={str(compiled).lower()}"]
        both += [f"train.activation_checkpointing=[{blocks_of}]"] if again else []
        jobs = {"plain": job_of(both), "compressed": job_of([*both, *COMPRESSED, masked(blocks_of)])}
        for job in jobs.values():
            block(job, 3)  # warm up; what acts is compiled
        taken: dict[str, list[float]] = {which: [] for which in jobs}
        for number in range(blocks):
            for which in jobs if number % 2 else reversed(jobs):
                taken[which].append(block(jobs[which], steps))
        ratio = statistics.median(c / p for p, c in zip(taken["plain"], taken["compressed"], strict=True))
        plain, compressed = (1e3 * statistics.median(taken[which]) for which in jobs)
        size = sum(p.numel() for p in jobs["plain"].model.parameters()) / 1e6
        peak = torch.cuda.max_memory_allocated() / 2**30 if comm.device().type == "cuda" else float("nan")
        print(f"| {name} | {size:.1f} M | {plain:.1f} | {compressed:.1f} | {ratio:.2f} | {peak:.1f} |", flush=True)
        del jobs, job
        gc.collect()
        if comm.device().type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in (("blocks", 10), ("steps", 5)):
        parser.add_argument(f"--{key}", type=int, default=value)
    for key in ("compile", "recompute", "small"):
        parser.add_argument(f"--{key}", action="store_true")
    given = parser.parse_args()
    main(given.blocks, given.steps, given.compile, given.recompute, given.small)
