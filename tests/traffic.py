"""Every collective of a run, step by step: those of dist_compress, of torch's DDP and FSDP2, and of DeepSpeed.

Imported on every rank of the pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Count = Counter[str]  # collectives by name, and "bytes"


class Traffic(TorchDispatchMode):
    """Counts collectives where all of them come by: operators of torch's namespaces c10d, whoever calls them, C++ or
    Python. Bytes: of the larger side of each, what a rank hands in or what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Count = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes plain tensors first, and what it sends is seen
        if "c10d" in func.namespace:
            sides = [tree_leaves(argument) for argument in args]
            sizes = [sum(t.nbytes for t in side if isinstance(t, torch.Tensor)) for side in sides]
            name = func._opname.strip("_")
            self.count[name] += 1
            self.count["bytes"] += 0 if name == "barrier" else max(sizes)
        return func(*args, **(kwargs or {}))


def num(count: Count) -> int:
    """Collectives, without their bytes."""
    return count.total() - count["bytes"]


@contextmanager
def counted(trainer: Any, steps: dict[int, Count]) -> Iterator[None]:
    """Fills the `steps` that are its keys: of optimizer step t its gradients, the step, and the decision and projection
    at its end."""
    original = trainer._one_step, trainer.settle

    def counting(act: Any, step: int) -> Any:
        if step not in steps:
            return act()
        with Traffic() as traffic:
            found = act()
        steps[step].update(traffic.count)
        return found

    trainer._one_step = lambda: counting(original[0], trainer.step)
    trainer.settle = lambda: counting(original[1], trainer.step - 1)
    try:
        yield
    finally:
        trainer._one_step, trainer.settle = original


RUN = [
    "+recipe=smoke",
    "+model._target_=layernorm_net.Net",
    "data.image_size=8",
    "train.max_steps=8",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",  # two a rank
    "train.eval_batch_size=180",
    "optim=adamw",
    "checkpoint.every_steps=null",
    "speedup.enabled=false",
    "export=[]",
]
PRUNED = [  # hidden units, and single weights of all that they leave
    "pruning.sparse_ratio=0.3",
    "pruning.schedule={name: linear, start: 3steps, end: 7steps, num_decisions: 3}",  # after 3, 5 and 7 steps
    "pruning.config_list=[{op_names_re: ['.*down', stem, head], granularity: element, global_group_id: weights},"
    " {op_names_re: ['.*up'], granularity: out_channel, dependency_group_id: auto, global_group_id: units}]",
]
QUANTIZED = [
    "quantization=qat",
    "quantization.config_list=[{op_types: [Linear]}]",  # weights and inputs in int8
    "quantization.start=3steps",
    "quantization.calibration_steps=1",
    "quantization.freeze=1.0",
]
TAUGHT = ["distillation=self", "distillation.teacher.start=3steps"]
DENSE, DECIDED, STEADY = 1, 4, 5  # steps: before anything acts; when all act, with a decision at its end; without one


def steps_of(run_dir: str, *overrides: str) -> dict[int, Count]:
    """What the steps DENSE, DECIDED and STEADY of a run send. Collective."""
    from dist_compress import compose, run

    Path(run_dir).mkdir(exist_ok=True)
    job = run.Job(compose.compose(compose.parse([*RUN, *overrides, f"run_dir={run_dir}"])))
    job.trainer.save = lambda: None  # type: ignore[method-assign, assignment, return-value]
    steps: dict[int, Count] = {step: Counter() for step in (DENSE, DECIDED, STEADY)}
    with counted(job.trainer, steps):
        for step, event in job.events():
            if step <= STEADY:
                job.trainer.train(until=step)
                event()
        job.trainer.train(until=STEADY + 1)
        job.trainer.settle()
    job.backend.release()
    job.reporter.close()
    return steps
