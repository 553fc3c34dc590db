"""What compression keeps beside a sharded model: no tensor as large as a whole weight, neither for the backward pass
nor from step to step.

Every tensor is looked at that Python knows, and all that autograd saved, by the bytes of its storage: FSDP2 leaves the
backward pass a view of each gathered weight whose storage is empty by then.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

WIDTH, HIDDEN = 197, 199  # sizes that nothing else has; a half of the largest weight is smaller than the smallest one
WHOLE = min(192 * WIDTH, WIDTH * HIDDEN)  # elements
RUN = [
    "+recipe=smoke",
    "+model._target_=layernorm_net.Net",
    f"+model.width={WIDTH}",
    f"+model.hidden={HIDDEN}",
    "data.image_size=8",
    "train.exact=null",
    "train.max_steps=8",
    "train.global_batch_size=24",
    "train.micro_batch_size=4",
    "train.eval_batch_size=180",
    "optim=adamw",
    "checkpoint.every_steps=null",
    "speedup.enabled=false",
    "export=[]",
]
PLAIN = ["pruning=none"]
COMPRESSED = [
    "pruning.method=taylor",
    "pruning.schedule={name: linear, start: 2steps, end: 8steps, num_decisions: 3}",  # after 2, 5 and 8 steps
    "pruning.config_list=[{op_types: [Linear], granularity: element, global_group_id: all}]",
    "quantization=qat",
    "quantization.config_list=[{op_types: [Linear]}, {op_names: [stem], target_names: [weight], quant_dtype: int4}]",
    "quantization.start=3steps",
    "quantization.calibration_steps=1",
    "distillation=self",
    "distillation.teacher.start=1steps",
    "distillation.teacher.sharded=true",
]
BACKENDS = {
    "fsdp": ["backend=fsdp", "backend.wrap=[Block]"],
    "zero-3": ["backend=deepspeed", "backend.stage=3"],
}
AUDITED = 4  # step: masked, quantized and taught; a decision falls at its end


def large() -> list[str]:
    """Storages that hold a whole weight, or more, of those made since `gc.freeze()`: as many elements of any dtype up
    to float32, or as many bytes of another."""
    time.sleep(0.1)  # threads of gloo let go of what they have sent
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        if not issubclass(type(tensor), torch.Tensor) or isinstance(tensor, DTensor) or tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() >= WHOLE * min(tensor.element_size(), 4):
            found[storage._cdata] = f"{storage.nbytes()} bytes: {tensor.dtype} {[*tensor.shape]}"
    return sorted(found.values())


@contextmanager
def watched(job: Any, seen: dict[str, list[str]]) -> Iterator[None]:
    """Looks around in step `AUDITED` after the forward pass of its last micro-batch, after the step, and once its
    decision and projection are over; then in the step after it, where a layer quantizes its weight in its forward pass,
    as is usual elsewhere."""
    trainer, backend, layer = job.trainer, job.backend, job.model.blocks[0].up
    original = backend.backward, trainer._one_step, trainer.settle

    def usual(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, (layer.weight * 8.0).round() / 8.0, layer.bias)

    def backward(loss: torch.Tensor, round: int, last: bool) -> None:
        if last and trainer.step >= AUDITED:
            seen["forward" if trainer.step == AUDITED else "usual"] = large()
        original[0](loss, round, last)

    def one_step() -> Any:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):  # so that Python knows them
            found = original[1]()
        if trainer.step == AUDITED + 1:
            seen["step"] = large()
        return found

    def settle() -> None:
        original[2]()
        if trainer.step == AUDITED + 1:
            seen["decision"] = large()
            layer.forward = usual

    backend.backward, trainer._one_step, trainer.settle = backward, one_step, settle
    yield
    backend.backward, trainer._one_step, trainer.settle = original


def audited(run_dir: str, *overrides: str) -> dict[str, list[str]]:
    """{moment: what is large}."""
    from dist_compress import compose, run

    gc.collect()
    gc.freeze()  # what other tests have left is not looked at
    Path(run_dir).mkdir(exist_ok=True)
    job = run.Job(compose.compose(compose.parse([*RUN, *overrides, f"run_dir={run_dir}"])))
    seen: dict[str, list[str]] = {}
    with watched(job, seen):
        for step, event in job.events():
            if step <= AUDITED:
                job.trainer.train(until=step)
                event()
        job.trainer.train(until=AUDITED + 2)
    job.backend.release()
    job.reporter.close()
    gc.unfreeze()
    return seen


@pytest.mark.parametrize("name", BACKENDS)
def test_no_weight_is_whole_beyond_the_backend_s_own(ranks: Any, tmp_path: Path, name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="NOT RUN deepspeed: pip install deepspeed --no-build-isolation")
    plain = ranks(2, audited, str(tmp_path / "plain"), *PLAIN, *BACKENDS[name])
    compressed = ranks(2, audited, str(tmp_path / "compressed"), *COMPRESSED, *BACKENDS[name])
    sizes = [f"{4 * WIDTH * HIDDEN} bytes", f"{4 * WIDTH * 192} bytes"]
    for before, after in zip(plain, compressed, strict=True):
        for moment in ("forward", "step", "decision"):
            assert len(before[moment]) >= len(after[moment]), (moment, before[moment], after[moment])
        for found in (*before["step"], *before["decision"]):
            assert not found.startswith(tuple(sizes)), found  # nor what the model was before it was sharded
        more = Counter(after["usual"]) - Counter(after["forward"])
        assert sum(found.startswith(sizes[0]) for found in more.elements()) == 1, more
