"""What torch.compile takes off a training step that prunes, quantizes and distils.

    python benchmarks/compile.py [--blocks 8] [--steps 2]

One process and one thread. The same step of two runs of one net, `train.compile` true and false, in alternating blocks,
so that whatever else the machine does falls on both: masks, int8 weights and inputs, and the loss against the net as it
was before; ratios are medians over blocks. Also how long the first compiled step takes. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from dist_compress import comm, compose, outcome
from dist_compress.run import Job

COMMON = [
    "logger=none", "export=[]", "train.exact=false", "train.channels_last=false", "train.max_steps=100000",
    "train.log_every_steps=100000", "checkpoint.every_steps=null", "pruning.schedule={name: one_shot, start: 1steps, "
    "end: 1steps, num_decisions: 1}", "speedup.at=100000steps", "quantization.start=2steps",
    "quantization.calibration_steps=1", "quantization.freeze=1.0", "distillation.teacher.start=2steps",
]  # fmt: skip
RUNS = {
    "resnet20, digits of 32 x 32": ["+recipe=resnet_fusion", "train.global_batch_size=64", "train.micro_batch_size=64"],
    "Llama of 4 layers, 16 x 128 bytes": [
        "model=llama", "data=text_file", "task=causal_lm", "optim=adamw", "pruning=transformer", "quantization=qat",
        "distillation=self", "train.global_batch_size=16", "train.micro_batch_size=16",
    ],
}  # fmt: skip


def job_of(overrides: list[str], compiled: bool) -> Job:
    """A run whose first steps are done: everything acts, and in a graph where it is compiled."""
    folder = tempfile.mkdtemp()
    settings = [*overrides, *COMMON, f"train.compile={str(compiled).lower()}", f"run_dir={folder}"]
    job = Job(compose.compose(compose.parse(settings)))
    for step, event in job.events():
        if step < 100000:
            job.trainer.train(until=step)
            event()
    return job


def block(job: Job, steps: int) -> float:
    """Seconds a step."""
    began = time.perf_counter()
    job.trainer.train(until=job.trainer.step + steps)
    return (time.perf_counter() - began) / steps


def main(blocks: int, steps: int) -> None:
    torch.set_num_threads(1)
    comm.init(600)
    outcome.LATENCY_S = 0.05
    rows = []
    for name, overrides in RUNS.items():
        jobs = {compiled: job_of(overrides, compiled) for compiled in (False, True)}
        first = {compiled: block(job, 1) for compiled, job in jobs.items()}
        taken: dict[bool, list[float]] = {False: [], True: []}
        for number in range(blocks):
            for compiled in (True, False) if number % 2 else (False, True):
                taken[compiled].append(block(jobs[compiled], steps))
        ratio = statistics.median(c / p for p, c in zip(taken[False], taken[True], strict=True))
        plain, graph = (1e3 * statistics.median(taken[compiled]) for compiled in (False, True))
        rows.append(f"| {name} | {plain:.0f} | {graph:.0f} | {ratio:.2f} | {first[True]:.0f} |")
    print("| step of | ms | ms compiled | ratio | first compiled step, s |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in (("blocks", 8), ("steps", 2)):
        parser.add_argument(f"--{key}", type=int, default=value)
    given = parser.parse_args()
    main(given.blocks, given.steps)
