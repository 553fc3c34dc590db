"""Students and teachers whose parameters lie in parts on the ranks (FSDP2): the answers and losses of whole ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_nets import Student, TeacherNet, images, losses
from ranks import RankError
from safetensors.torch import save_file
from sharded_nets import shard
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from whole_runs import killed_at

from dist_compress import comm, models
from dist_compress.calling import Headless, call_headless, logits
from dist_compress.config import ModelConfig, load
from dist_compress.distillation.distiller import Distiller
from dist_compress.distillation.teacher import OnlineTeacher
from dist_compress.distillation.vocabulary import rows_of
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.target import Coupling

SIZES = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama(width: int = 32, tied: bool = False) -> Any:
    kwargs = {**SIZES, "hidden_size": width, "tie_word_embeddings": tied}
    return models.build(ModelConfig("hf", "llama", "causal_lm", kwargs=kwargs), 61, 5, 61)


def sharded_llama(tied: bool, head: bool, root: bool | None) -> Any:
    """`head`: the output layer is a unit. `root`: whether the outermost one frees its parameters after a forward."""
    model = llama(tied=tied)
    for unit in (*model.model.layers, *([model.lm_head] if head else [])):
        fully_shard(unit)
    fully_shard(model, reshard_after_forward=root)
    return model


def answers(tied: bool, head: bool, root: bool | None) -> dict[str, Any]:
    """Of a sharded teacher, next to those of a whole one."""
    whole, model = OnlineTeacher(llama(tied=tied)), sharded_llama(tied, head, root)
    teacher = OnlineTeacher(model)
    batch = {"inputs": {"input_ids": torch.arange(3 + comm.rank()).repeat(2, 4) + comm.rank()}}
    found = {"full": torch.equal(logits(teacher(batch)), logits(whole(batch)))}
    for name in ("headless", "rows"):
        own, right = (logits(t(batch, headless=True)) for t in (teacher, whole))
        assert isinstance(own, Headless) and isinstance(right, Headless)
        found[name] = torch.equal(own.hidden, right.hidden) and torch.equal(own.weight, right.weight)
        found[f"{name} freed"] = all(isinstance(p, DTensor) for p in model.parameters())
        rows = rows_of(61, comm.rank())
        whole.keep_rows(rows)
        teacher.keep_rows(rows)
    state, right = teacher.state(), whole.state()
    found["state"] = all(torch.equal(x, right[name]) for name, x in state.items() if "lm_head" not in name)
    teacher.take(lambda name: state[name] + 1)
    found["taken"] = all(torch.equal(x, state[name] + 1) for name, x in teacher.state().items())
    return {**found, "note": teacher.note(), "units": isinstance(model.lm_head, FSDPModule)}


@pytest.mark.parametrize(("tied", "head", "root"), [(False, False, None), (False, True, True), (True, False, False)])
def test_a_sharded_teacher_answers_as_a_whole_one(ranks, tied, head, root):
    for n in (2, 3):
        results, held = ranks(n, answers, tied, head, root), 0
        for result in results:
            note, units = result.pop("note"), result.pop("units")
            assert all(result.values()), result
            assert units == head and "rows of its output layer are used here" in note
            held += int(note.partition("sharded: ")[2].split()[0].replace(",", ""))
        assert held == sum(p.numel() for p in llama(tied=tied).parameters())


def distilled(sharded: bool) -> dict[str, torch.Tensor]:
    """Losses of logits and hidden states of this rank's samples."""
    torch.manual_seed(0)
    student, teacher = Student(), TeacherNet()
    if sharded:
        shard(teacher, "fsdp")
    entries = [{"op_names": ["layer1"], "method": "attention_transfer"}, {"op_names": ["layer2"], "method": "fitnets"}]
    config = load({"distillation": {"method": "logits", "config_list": entries}})
    distiller = Distiller(config, OnlineTeacher(teacher))
    context = Context(config, student, Projection(student), Coupling(), 5, 10, 5.0, ((images(2),), {}))
    distiller.attach(context)
    return {name: x.detach() for name, x in losses(distiller, student, 4 + comm.rank()).items()}


def test_logits_and_hidden_states_of_a_sharded_teacher(ranks):
    for found, right in zip(ranks(3, distilled, True), ranks(3, distilled, False), strict=True):
        assert len(found) == 3 and found == right


def own_teacher() -> list[bool]:
    """mode=self: a sharded teacher becomes the student, and goes through a checkpoint."""
    section = {"method": "logits", "teacher": {"mode": "self", "start": 0.5}}
    torch.manual_seed(0)
    student, teacher = Student(), Student()
    shard(teacher, "fsdp")
    made = []
    for model in (student, Student()):
        config = load({"distillation": section})
        distiller = Distiller(config, OnlineTeacher(teacher))
        distiller.attach(Context(config, model, Projection(model), Coupling(), 5, 10, 5.0, ((images(2),), {})))
        made.append(distiller)
    first, second = made
    first.start()
    right, saved = student.state_dict(), first.state_dict()
    found = [all(torch.equal(x, right[name]) for name, x in saved["teacher"].items())]
    saved["teacher"] = {name: x + 1 for name, x in saved["teacher"].items()}
    second.load_state_dict(saved)
    again = second.state_dict()["teacher"]
    return [*found, second.teaches, all(torch.equal(x, right[name] + 1) for name, x in again.items())]


def test_a_sharded_teacher_of_its_own_student(ranks):
    assert ranks(2, own_teacher) == [[True, True, True]] * 2


RUN = [
    "data=text_file", "data.sequence_length=24", "task=causal_lm", "task.fused_head=true", "model=llama", "optim=adamw",
    "logger=none", "model.kwargs.hidden_size=16", "train.global_batch_size=20", "train.micro_batch_size=4",
    "train.max_steps=3", "train.log_every_steps=1", "export=[]", "distillation=logits", "distillation.temperature=2.0",
    "model@distillation.teacher.model=llama", "distillation.teacher.model.kwargs.hidden_size=32",
    "distillation.teacher.model.weights={}/teacher.safetensors", "data.root={}",
    *(f"{place}model.kwargs.{k}={v}" for place in ("", "distillation.teacher.") for k, v in SIZES.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("".join(f"line {i} of a text of {i * i} letters\n" for i in range(60)))
    (folder / "test.txt").write_text("".join(f"letter {i} of {i * i}\n" for i in range(20)))
    kwargs = {**SIZES, "hidden_size": 32}
    state = models.build(ModelConfig("hf", "llama", "causal_lm", kwargs=kwargs), 259, 5, 259).state_dict()
    save_file({name: tensor * 3 for name, tensor in state.items()}, folder / "teacher.safetensors")
    return folder


def whole_run(folder: str, run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    given = [word.replace("{}", folder) for word in (*RUN, *overrides, f"run_dir={run_dir}")]
    run.run(compose.compose(compose.parse(given)))
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    series = [line["train/logits_loss"] for line in lines if "train/logits_loss" in line]
    return {"mark": json.loads((Path(run_dir) / "summary.json").read_text())["fingerprint/weights"], "series": series}


def test_a_fused_head_of_a_sharded_student(ranks, tmp_path, material):
    """In the outermost unit, kept or freed after the forward pass, and as a unit of its own; with five micro-batches,
    so that a rank has a dummy."""
    exact, sharded = "train.exact=true", "backend=fsdp"
    right = ranks(1, whole_run, str(material), str(tmp_path / "ddp"), exact)[0]
    ways = {
        "freed": [exact], "kept": [exact, "backend.reshard_after_forward=false"],
        "unit": [exact, "backend.wrap=[Linear]"], "split": ["distillation.teacher.mode=vocab"],
        "split unit": ["distillation.teacher.mode=vocab", "backend.wrap=[Linear]"],
    }  # fmt: skip
    for name, more in ways.items():
        found = ranks(2, whole_run, str(material), str(tmp_path / name), sharded, *more)[0]
        if exact in more:
            assert found == right, name
        else:
            assert found["series"] == pytest.approx(right["series"], rel=1e-6), name


def hooked() -> str:
    """A hook of one's own on an output layer that is a unit is still refused."""
    model = sharded_llama(False, True, None)
    model.lm_head.register_forward_hook(lambda *a: None)
    try:
        call_headless(model, {"input_ids": torch.arange(6)[None]}, "task.fused_head")
    except Exception as error:
        return str(error)
    return ""


def test_a_hook_on_a_sharded_output_layer(ranks):
    assert all("the output of the last layer is a target itself" in text for text in ranks(2, hooked))


SHARDED, EXACT = "distillation.teacher.sharded=true", "train.exact=true"
LAYERS = ["task.fused_head=false", "distillation.config_list=[{op_names: [model.layers.1], method: fitnets}]"]
SELF = ["distillation.teacher.mode=self", "distillation.teacher.start=1steps"]


def teacher_of(run_dir: Path) -> str:
    texts = [json.loads(line)["text"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return next(text for text in texts if text.startswith("teacher: "))


@pytest.mark.parametrize(("backend", "more"), [("ddp", LAYERS), ("fsdp", SELF)])
def test_a_run_with_a_sharded_teacher_has_the_bits_of_one_rank(ranks, tmp_path, material, backend, more):
    """With five micro-batches, so that a rank of two or three has a dummy."""
    right = ranks(1, whole_run, str(material), str(tmp_path / "one"), EXACT, *more)[0]
    for n in (2, 3):
        found = ranks(n, whole_run, str(material), str(tmp_path / str(n)), f"backend={backend}", EXACT, SHARDED, *more)
        assert found[0] == right
        assert re.match(r"teacher: LlamaForCausalLM with .* sharded: ", teacher_of(tmp_path / str(n)))


def reads(folder: str, run_dir: str, *overrides: str) -> tuple[dict[str, Any], bool, bool]:
    """What a run gives, whether this rank has read weights, and whether it has seen its teacher whole."""
    from dist_compress import models
    from dist_compress.distillation import teacher

    load, init, has_read, whole = models.load_weights, teacher.OnlineTeacher.__init__, [], []

    def loading(*args: Any) -> None:
        has_read.append(args)
        load(*args)

    def beginning(self: Any, model: torch.nn.Module, *args: Any) -> None:
        whole.extend(p for p in model.parameters() if not isinstance(p, DTensor))
        init(self, model, *args)

    models.load_weights, teacher.OnlineTeacher.__init__ = loading, beginning
    try:
        return whole_run(folder, run_dir, *overrides), bool(has_read), bool(whole)
    finally:
        models.load_weights, teacher.OnlineTeacher.__init__ = load, init


def test_rank_0_alone_reads_a_sharded_teacher(ranks, tmp_path, material):
    right = ranks(1, whole_run, str(material), str(tmp_path / "one"), EXACT)[0]
    found = ranks(2, reads, str(material), str(tmp_path / "two"), EXACT, SHARDED)
    assert found == [(right, True, False), (right, False, False)]
    control = ranks(2, reads, str(material), str(tmp_path / "whole"), EXACT)
    assert control == [(right, True, True), (right, True, True)]
    wrong = [SHARDED, "distillation.teacher.model.weights=nowhere.safetensors"]
    with pytest.raises(RankError, match="distillation.teacher.model.weights='nowhere.safetensors'") as failed:
        ranks(2, whole_run, str(material), str(tmp_path / "bad"), EXACT, *wrong)
    assert "rank 0 of 2" in str(failed.value) and "rank 1 of 2" in str(failed.value)


def killed_run(folder: str, run_dir: str, *overrides: str) -> None:
    with killed_at(2):
        whole_run(folder, run_dir, "checkpoint.every_steps=1", *overrides)


def test_a_sharded_teacher_of_its_own_student_is_resumed_elsewhere(ranks, tmp_path, material):
    """Killed after it has got its weights, on three ranks with FSDP2; gone on with on two."""
    given = [EXACT, *SELF, "checkpoint.every_steps=1", "backend=fsdp", SHARDED]
    right = ranks(1, whole_run, str(material), str(tmp_path / "one"), *given)[0]
    ranks(3, killed_run, str(material), str(tmp_path / "two"), *given)
    found = ranks(2, whole_run, str(material), str(tmp_path / "two"), *given)[0]
    assert found["mark"] == right["mark"] and found["series"][-1] == right["series"][-1]


@pytest.mark.parametrize(
    "more",
    [
        ["backend=fsdp", "distillation.teacher.mode=vocab"],
        ["backend=deepspeed", "backend.stage=3", *LAYERS],
        ["backend=deepspeed", "backend.stage=1"],
    ],
)
def test_a_sharded_teacher_beside_plain_sums(ranks, tmp_path, material, more):
    given = [word for word in more if not word.startswith(("backend", "distillation.teacher.mode"))]
    right = ranks(1, whole_run, str(material), str(tmp_path / "one"), *given)[0]
    found = ranks(2, whole_run, str(material), str(tmp_path / "two"), SHARDED, *more)[0]
    assert found["series"] == pytest.approx(right["series"], rel=1e-6)


def test_a_store_cannot_be_shared_out(ranks, tmp_path, material):
    given = [
        SHARDED,
        "distillation.teacher.mode=store",
        "task.fused_head=false",
        f"distillation.teacher.store={tmp_path}",
    ]
    with pytest.raises(Exception, match="distillation.teacher.sharded=true with mode=store"):
        ranks(2, whole_run, str(material), str(tmp_path / "run"), *given)


def written(folder: str, run_dir: str, store: str, *overrides: str) -> tuple[Any, list[list[int]]]:
    """What the manifest says of the teacher, the keys in each part, and all records."""
    from dist_compress.distillation.store import Store

    more = [
        "train.max_steps=1",
        "task.fused_head=false",
        "distillation.method=null",
        f"distillation.store.write={store}",
    ]
    whole_run(folder, run_dir, EXACT.replace("true", "null"), *more, *overrides)
    read, parts = Store(Path(store), "store"), sorted(Path(store).glob("*.idx"))
    records = read.read(sorted(read.keys.tolist()))
    return (read.origin, [part.stat().st_size for part in parts]), torch.as_tensor(records).tolist()


@pytest.mark.parametrize("backend", [["backend=fsdp"], ["backend=deepspeed", "backend.stage=3"]])
def test_a_sharded_model_writes_the_store_of_a_whole_one(ranks, tmp_path, material, backend):
    """Every rank a part of it, one fewer batches than the others."""
    keys = ["train.max_steps=0", "train.eval_batch_size=7", "distillation.store.views=1"]
    (right, _), records = ranks(1, written, str(material), str(tmp_path / "a"), str(tmp_path / "one"), *keys)[0]
    given = [str(material), str(tmp_path / "b"), str(tmp_path / "shared"), *keys, *backend]
    (origin, parts), found = ranks(3, written, *given)[0]
    assert origin == right and found == records and len(parts) == 3 and len(set(parts)) == 2
