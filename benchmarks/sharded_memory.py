"""Peak memory of a rank, with and without compression: a Llama of 200 M parameters on 1, 2 and 4 ranks.

    python benchmarks/sharded_memory.py [--ranks 1 2 4] [--backends ddp fsdp deepspeed] [--arms none ...] [--layers 16]

Float32, SGD with momentum, one micro-batch of 32 tokens a rank and step; each row is a run in fresh processes.
`prune, int8`: single weights masked by taylor, weights and inputs in int8. `and teacher`: what the student was, too,
sharded (`distillation.teacher.sharded`), whole with ddp. On one rank all backends are the same.

Two measures, in GB (1e9 bytes), of the rank that has most. Tensors: bytes in the allocator of torch's CPU tensors, by
the memory events of torch.profiler, which runs from before the model is built, so that it has seen every allocation.
Resident: of the process, by Linux (VmHWM, set back before each phase by /proc/self/clear_refs), less what it had after
its imports; MALLOC_MMAP_THRESHOLD_ is fixed, so that what a tensor leaves goes back at once. It has buffers of gloo in
it, and what the profiler remembers. Phases: building, to the first step; a step without a decision, all methods acting;
and the step with a decision at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

MODEL = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
RUN = [
    "logger=none", "model=llama", "data=text_file", "data.sequence_length=32", "task=causal_lm",
    "optim.kwargs={momentum: 0.9}", "optim.lr=0.001", "train.exact=false", "train.micro_batch_size=1",
    "train.max_steps=4", "train.num_threads=1", "checkpoint.every_steps=null",
    "speedup.enabled=false", "export=[]",
]  # fmt: skip
COMPRESSED = [
    "pruning.method=taylor", "pruning.sparse_ratio=0.5",
    "pruning.schedule={name: linear, start: 1steps, end: 4steps, num_decisions: 2}",
    "pruning.config_list=[{op_types: [Linear], granularity: element, global_group_id: all}]",
    "quantization=qat", "quantization.config_list=[{op_types: [Linear]}]", "quantization.start=1steps",
    "quantization.calibration_steps=1", "quantization.freeze=1.0",
]  # fmt: skip
ARMS = {
    "none": [],
    "prune, int8": COMPRESSED,
    "and teacher": [*COMPRESSED, "distillation=self", "distillation.teacher.start=1steps"],
}
BACKENDS = {  # what a rank gathers at once is small beside the model
    "ddp": ["backend=ddp"],
    "fsdp": ["backend=fsdp"],
    "deepspeed": ["backend=deepspeed", "backend.stage=3", "backend.reduce_bucket_size=13000000",
                  "backend.prefetch_bucket_size=13000000"],
}  # fmt: skip
LIVE = {"zero_optimization": {"stage3_max_live_parameters": 13_000_000, "stage3_max_reuse_distance": 13_000_000}}
DECIDED, STEADY = 0, 2  # steps
PHASES = ("build", "step", "decision")


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Phases:
    """When each phase was, and the resident peak in it."""

    def __init__(self) -> None:
        self.before = resident("VmRSS")
        self.spans: dict[str, list[tuple[int, int]]] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")
        began = time.time_ns()
        yield
        if name is not None:
            self.spans.setdefault(name, []).append((began, time.time_ns()))
            self.peaks[name] = max(self.peaks.get(name, 0), resident("VmHWM") - self.before)


def allocated(profiler: Any) -> list[tuple[int, int]]:
    """(time in ns, bytes of CPU tensors from then on) of every event of the allocator, in order."""
    found, todo = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            found.append((event.start_time_ns, fields.total_allocated))
    return sorted(found)


def most(events: list[tuple[int, int]], spans: list[tuple[int, int]]) -> int:
    """The largest number of bytes in any of the spans, with what there was at their beginning."""
    best = 0
    for began, ended in spans:
        held = [total for moment, total in events if moment < began][-1:]
        best = max([best, *held, *(total for moment, total in events if began <= moment <= ended)])
    return best


def worker(out: str, overrides: list[str]) -> None:
    """Train, and write what this rank has seen."""
    from dist_compress import comm, compose, run

    comm.init(1800)
    phases = Phases()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with phases.phase("build"):
            job = run.Job(compose.compose(compose.parse(overrides)))
        trainer = job.trainer
        trainer.save = lambda: None  # type: ignore[method-assign, assignment, return-value]
        one_step, settle = trainer._one_step, trainer.settle

        def stepping() -> Any:
            with phases.phase({STEADY: "step", DECIDED: "decision"}.get(trainer.step)):
                return one_step()

        def settling() -> None:
            with phases.phase({STEADY + 1: "step", DECIDED + 1: "decision"}.get(trainer.step)):
                settle()

        trainer._one_step, trainer.settle = stepping, settling  # type: ignore[method-assign]
        events = [] if not job.methods else [(step, event) for step, event in job.events() if 0 < step <= STEADY]
        for step, event in events:
            trainer.train(until=step)
            if event != job.dense:
                event()
        trainer.train(until=STEADY + 1)
        trainer.settle()
    seen = allocated(profiler)
    found = {name: (most(seen, phases.spans[name]), phases.peaks[name]) for name in PHASES}
    num = sum(job.backend.layout.shape(name).numel() for name, _ in job.model.named_parameters())
    Path(f"{out}.{comm.rank()}").write_text(json.dumps({"params": num, **found}))
    comm.shutdown()


def measure(folder: Path, num_ranks: int, backend: str, arm: str, layers: int) -> dict[str, Any]:
    """{phase: (bytes in tensors, resident bytes)} of the rank with most."""
    here = Path(tempfile.mkdtemp(dir=folder))
    for split, count in (("train", 300), ("test", 8)):  # evaluations are short
        (here / f"{split}.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(count)))
    sizes = [f"model.kwargs.{key}={value}" for key, value in {**MODEL, "num_hidden_layers": layers}.items()]
    told = [*RUN, *BACKENDS[backend], *ARMS[arm], *sizes, f"data.root={here}", f"run_dir={here}/run"]
    told.append(f"train.global_batch_size={num_ranks}")
    if backend == "deepspeed":
        (here / "zero.json").write_text(json.dumps(LIVE))
        told.append(f"backend.config_file={here}/zero.json")
    if arm == "and teacher" and backend != "ddp":
        told.append("distillation.teacher.sharded=true")
    (here / "run").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    threads = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    run = subprocess.run(
        [*command, __file__, "--worker", f"{here}/found", *told],
        env={**os.environ, **threads}, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        sys.exit(f"{backend} on {num_ranks} ranks, {arm}:\n{run.stderr[-12000:]}")
    ranks = [json.loads(Path(f"{here}/found.{rank}").read_text()) for rank in range(num_ranks)]
    return {key: max(found[key] for found in ranks) if key == "params" else
            [max(found[key][i] for found in ranks) for i in (0, 1)] for key in ranks[0]}  # fmt: skip


def main(given: argparse.Namespace) -> None:
    print(f"| backend | ranks | compression | {' | '.join(f'{p}: tensors | resident' for p in PHASES)} |")
    print(f"|{'---|' * (3 + 2 * len(PHASES))}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for backend in given.backends:
            for num_ranks in given.ranks:
                for arm in given.arms:
                    found = measure(Path(folder), num_ranks, backend, arm, given.layers)
                    phases = PHASES if ARMS[arm] else PHASES[:2]  # nothing is decided
                    cells = " | ".join(f"{gb / 1e9:.2f}" for phase in phases for gb in found[phase])
                    print(f"| {backend} | {num_ranks} | {arm} | {cells} |{' | |' * (arm == 'none')}", flush=True)
                    print(f"{found['params']:,} parameters", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        torch.set_num_threads(1)
        worker(sys.argv[2], sys.argv[3:])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
        parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
        parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
        parser.add_argument("--layers", type=int, default=16)
        main(parser.parse_args())
