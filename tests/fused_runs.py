"""Runs of a transformer and of a net with BatchNorm, pruned, quantized and distilled at once: how they are computed
changes nothing of them. Imported on every rank of the pool."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from dist_compress import compose, outcome, run
from dist_compress.compiling import Compiled
from dist_compress.layout import local_part
from dist_compress.recompute import _Again

RUN = [
    "+recipe=smoke",
    "train.exact=true",
    "train.channels_last=false",
    "train.max_steps=10",
    "train.eval_batch_size=180",
    "data.image_size=8",
    "optim=adamw",
    "optim.lr=0.003",
    "quantization=qat",
    "quantization.start=1steps",
    "quantization.calibration_steps=1",
    "distillation=self",
    "distillation.teacher.start=1steps",
    "pruning.schedule={name: linear, start: 4steps, end: 6steps, num_decisions: 2}",
    "checkpoint.every_steps=null",
    "export=[]",
]
NETS = {
    "transformer": [
        "+model._target_=block_net.Net",
        "pruning.config_list=[{op_names_re: ['.*up'], dependency_group_id: auto, granularity: out_channel},"
        "{op_names_re: ['.*proj'], method: wanda, sparse_ratio: 0.5},"
        "{op_types: [ReLU], target_names: [_output_], method: mean_activation, granularity: per_channel}]",
        "pruning.method=taylor",
        "quantization.config_list=[{op_types: [Linear, add]}]",
        "distillation.config_list=[{op_names: [blocks.0.up], method: fitnets}]",
    ],
    "batchnorm": [
        "pruning.method=mean_activation",
        "quantization.config_list=[{op_types: [Conv2d, Linear, add]}]",
        "distillation.config_list=[{op_names: [layer1.0.conv2], method: fitnets}]",
    ],
}

AGAIN = "train.activation_checkpointing=[Block]"  # of both nets


def job_of(run_dir: str, net: str, *overrides: str) -> run.Job:
    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    return run.Job(compose.compose(compose.parse([*RUN, *NETS[net], *overrides, f"run_dir={run_dir}"])))


def heard(run_dir: str, net: str, steps: int, *overrides: str) -> dict[str, str]:
    """{what a run holds after some steps: its bits}: weights, moments, and all that was observed."""
    job = job_of(run_dir, net, *overrides)
    for step, event in job.events():
        if step < steps:
            job.trainer.train(until=step)
            event()
    job.trainer.train(until=steps)
    found = {}
    for path, leaf in tree_flatten_with_path(job.trainer.state())[0]:
        tensor = isinstance(leaf, torch.Tensor)
        value = local_part(leaf).contiguous().numpy().tobytes() if tensor else repr(leaf).encode()
        found["/".join(map(str, path))] = hashlib.sha256(value).hexdigest()
    job.reporter.close(finished=False)
    return found


def whole_run(run_dir: str, net: str, *overrides: str) -> dict[str, Any]:
    """What became of a run, its losses, and the modules that are run again after the shrink, and as delivered."""
    job = job_of(run_dir, net, *overrides)
    job.train()
    shrunk = dressed(job.model)
    job.deliver()
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((Path(run_dir) / "summary.json").read_text())
    names = ("fingerprint/weights", "fingerprint/plan", "fingerprint/scales", "loss/masked", "loss/after", "macs/after")
    bits: dict[str, Any] = {name: summary[name] for name in names}
    bits["decisions"] = json.loads((Path(run_dir) / "facts.json").read_text())["methods"]["decisions"]
    bits["losses"] = [{k: v for k, v in row.items() if "loss" in k} for row in rows]
    return {
        "bits": bits,
        "shrunk": shrunk,
        "delivered": dressed(job.model),
        "smaller": summary["macs/after"] / summary["macs/before"],
    }


def dressed(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(vars(m).get("forward"), _Again | Compiled)]


BACKENDS = {
    "fsdp exact": ["backend=fsdp", "backend.wrap=[Block]"],
    "fsdp, units inside": ["backend=fsdp", "backend.wrap=[LayerNorm,FusedAttention]", "train.exact=false"],
    "zero-3": ["backend=deepspeed", "backend.stage=3", "train.exact=false"],
}
