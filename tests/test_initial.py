"""The model that a sharded run begins with: whole on no device, and the same as everywhere else."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from whole_runs import killed_at

RUN = [
    "+recipe=smoke",
    "data.image_size=8",
    "train.channels_last=false",
    "train.max_steps=4",
    "train.global_batch_size=24",
    "train.micro_batch_size=4",
    "train.eval_batch_size=180",
    "pruning=none",
    "distillation=none",
    "export=[]",
]
SIZES = "model.kwargs={hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2"


class Largest(TorchDispatchMode):
    """The number of elements of the largest real tensor of floats that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        real = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and not t.is_meta and t.is_floating_point()]
        self.numel = max([self.numel, *(t.numel() for t in real)])
        return made


def begun(name: str) -> dict[str, Any]:
    """What a rank has of the net `name` before it is sharded, and what it is given of it then."""
    import initial_nets

    from dist_compress import comm, initial

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return getattr(initial_nets, name)()

    right = build()
    with Largest() as largest:
        found = initial.begin(build, build, lambda model: model, ((torch.randn(2, 3, 8, 8),), {}))
    model = found.model
    tensors = {n: torch.equal(t, dict(right.named_buffers())[n]) for n, t in model.named_buffers()}
    waits = [p.is_meta for p in model.parameters()]
    result = {
        "waits": all(waits), "places": model.one.weight is model.two.weight, "tensors": all(tensors.values()),
        "attributes": torch.equal(model.shift, right.shift) and torch.equal(model.same, right.drawn),
        "tables": torch.equal(model.tables[0], right.tables[0]) if name == "Keeps" else True,
        "trained": [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in right.parameters()],
        "largest": largest.numel, "notes": found.notes, "num_values": len(found.values or {}),
    }  # fmt: skip
    if comm.rank() == 0:  # as all that needs values sees it, and it is no longer so afterwards
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        result["real"] = torch.equal(found.real(lambda model, call: model.eval()(x)), right.eval()(x))
        result["tensors"] &= all(p.is_meta for p in model.parameters()) == all(waits)
    source = found.source()
    if source is not None:
        own = dict(right.named_parameters())
        result["values"] = all(torch.equal(source(n), own[n]) for n, _ in model.named_parameters())
        result["num_left"] = len(found.values)
    return result


WHOLE = 4 * 16 * 16  # elements of the largest parameter of these nets


@pytest.mark.parametrize(("name", "on_meta"), [("Tied", True), ("Reads", False), ("Keeps", False)])
def test_parameters_wait_on_rank_0_and_the_rest_is_everywhere(ranks: Any, name: str, on_meta: bool) -> None:
    first, second = ranks(2, begun, name)
    for found in (first, second):
        wanted = ("waits", "places", "tensors", "attributes", "tables", "trained", "values")
        assert [k for k in wanted if not found[k]] == []
        assert not found["notes"] and found["num_left"] == 0
    assert first["real"] and first["num_values"] == 11 and second["num_values"] == 0
    assert first["largest"] >= WHOLE and (second["largest"] < WHOLE) == on_meta


def test_a_model_that_does_not_run_without_values_is_whole_on_every_rank(ranks: Any) -> None:
    for found in ranks(2, begun, "Looks"):
        assert not found["waits"] and "values" not in found
        assert found["notes"][0].startswith("every rank builds the whole model: without weights it fails with")


def started(run_dir: str, backend: list[str]) -> dict[str, Any]:
    """Parameters from construction to wrapping, and whole ones that are left behind."""
    from dist_compress import compose
    from dist_compress.backends.ddp import Ddp
    from dist_compress.backends.deepspeed import DeepSpeed
    from dist_compress.backends.fsdp import Fsdp
    from dist_compress.run import Job

    seen: dict[str, Any] = {}
    originals = {kind: vars(kind)["wrap"] for kind in (Ddp, Fsdp, DeepSpeed)}

    def noting(kind: Any) -> Any:
        def wrap(self: Any, model: nn.Module, *rest: Any) -> nn.Module:
            seen.setdefault("meta", [p.is_meta for p in model.parameters()])
            seen.setdefault("shapes", {tuple(p.shape) for p in model.parameters() if p.numel() > 2000})
            return originals[kind](self, model, *rest)

        return wrap

    for kind in originals:
        kind.wrap = noting(kind)  # type: ignore[method-assign]
    Path(run_dir).mkdir(exist_ok=True)
    try:
        job = Job(compose.compose(compose.parse([*RUN, *backend, f"run_dir={run_dir}"])))
    finally:
        for kind, original in originals.items():
            kind.wrap = original  # type: ignore[method-assign]
    job.backend.rest()
    gc.collect()
    alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and type(t).__name__ != "DTensor"]
    whole = [tuple(t.shape) for t in alive if tuple(t.shape) in seen["shapes"] and not t.is_meta and t.numel()]
    job.reporter.close(finished=False)
    return {"meta": all(seen["meta"]), "any meta": any(seen["meta"]), "whole": len(whole), "num": len(seen["shapes"])}


@pytest.mark.parametrize(
    "backend",
    [["backend=fsdp", "backend.min_params=10000"], ["train.exact=false", "backend=deepspeed", "backend.stage=3"]],
)
def test_no_whole_parameter_before_and_after_it_is_sharded(ranks: Any, tmp_path: Path, backend: list[str]) -> None:
    for found in ranks(3, started, str(tmp_path), backend):  # of three, no part has the shape of another whole
        assert found["meta"] and found["num"] > 3
        assert found["whole"] == 0


def killed_run(run_dir: str, step: int, *overrides: str) -> None:
    with killed_at(step):
        whole_run(run_dir, *overrides)


def test_no_parameter_has_values_before_a_small_model_that_is_resumed_is_sharded(ranks: Any, tmp_path: Path) -> None:
    words = [*CUT, "backend=fsdp", "backend.min_params=10000", "checkpoint.every_steps=1"]
    ranks(2, killed_run, str(tmp_path), 6, *words)
    for found in ranks(3, started, str(tmp_path), words):
        assert found["meta"] and found["num"] > 3


def test_negative_control(ranks: Any, tmp_path: Path) -> None:
    for found in ranks(3, started, str(tmp_path), ["backend=ddp"]):
        assert not found["any meta"] and found["whole"] > 3


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    run.run(compose.compose(compose.parse([*RUN, *overrides, f"run_dir={run_dir}"])))
    summary = json.loads((Path(run_dir) / "summary.json").read_text())
    events = (Path(run_dir) / "events.jsonl").read_text()
    return {**summary, "events": events}


BITS = ("fingerprint/weights", "loss/before", "loss/after", "params/before", "macs/before", "file_bytes/before")


@pytest.mark.parametrize("name", ["Tied", "Reads", "Keeps", "Looks"])
def test_a_run_has_the_bits_of_one_rank(ranks: Any, tmp_path: Path, name: str) -> None:
    model = ["train.exact=true", f"+model._target_=initial_nets.{name}"]
    one = ranks(1, whole_run, str(tmp_path / "one"), *model)[0]
    two = ranks(2, whole_run, str(tmp_path / "two"), *model, "backend=fsdp")[0]
    assert {key: two[key] for key in BITS} == {key: one[key] for key in BITS}
    assert ("every rank builds the whole model" in two["events"]) == (name == "Looks")


def refused(run_dir: str, weights: str) -> str:
    from dist_compress.errors import UserError

    try:
        whole_run(run_dir, "backend=fsdp", f"model.weights={weights}")
    except UserError as error:
        return str(error)
    return ""


def test_what_rank_0_cannot_read_every_rank_says(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"no weights")
    first, *others = ranks(3, refused, str(tmp_path / "run"), str(tmp_path / "torn.safetensors"))
    assert first.startswith("model.weights=") and "truncated, damaged or of another format" in first
    assert others == [first, first]


CUT = [
    "train.exact=true",
    "train.max_steps=8",
    "pruning=channel",
    "pruning.method=l2_norm",
    "pruning.sparse_ratio=0.5",
    "pruning.schedule={name: one_shot, start: 4steps, end: 4steps}",
]
HIDDEN = [
    *CUT,
    "distillation=self",
    "distillation.teacher.start=1steps",
    "distillation.config_list=[{op_names: [layer1.0.bn1, layer3], method: fitnets}]",
]


def hidden_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    """With the channels that a shrink has left of what is distilled, at the last step."""
    from dist_compress.distillation.distiller import Distiller

    kept: dict[str, int] = {}
    original = Distiller.before_step

    def noting(self: Distiller, step: int) -> None:
        kept.update({layer.name: -1 if layer.kept is None else len(layer.kept) for layer in self.layers})
        original(self, step)

    Distiller.before_step = noting  # type: ignore[method-assign]
    try:
        found = whole_run(run_dir, *HIDDEN, *overrides)
    finally:
        Distiller.before_step = original  # type: ignore[method-assign]
    return {key: found[key] for key in ("fingerprint/plan", "loss/shrunk", *BITS)} | {"kept": kept}


def test_hidden_states_of_a_sharded_student_are_found_again_when_it_is_small(ranks: Any, tmp_path: Path) -> None:
    one = ranks(1, hidden_run, str(tmp_path / "one"))[0]
    assert 0 < one["kept"]["fitnets/layer1.0.bn1._output_0"] < 16, one["kept"]
    assert ranks(2, hidden_run, str(tmp_path / "two"), "backend=fsdp", "backend.min_params=10000")[0] == one
