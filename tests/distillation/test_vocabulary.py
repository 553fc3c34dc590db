"""The vocabulary split over the ranks: values and gradients of whole output layers, whoever has how many tokens, and
runs that learn what `mode=online` learns with no logits and no output layer of the teacher whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_compress import comm, models
from dist_compress.config import ModelConfig
from dist_compress.distillation.head import Head, head_loss
from dist_compress.distillation.losses import KINDS, Divergence
from dist_compress.distillation.vocabulary import rows_of, split_loss
from dist_compress.errors import UserError

H, SLOPE = 6, 3.0
TOKENS = {"unequal": [9, 4, 12, 7], "a rank without": [9, 0, 5, 0], "none": [0, 0, 0, 0]}  # valid ones, by rank


def tensors(vocabulary: int, tokens: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {"hidden": (tokens, H), "weight": (vocabulary, H), "bias": (vocabulary,)}
    shapes |= {"teacher": (tokens, 2 * H), "theirs": (vocabulary, 2 * H)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def split(vocabulary: int, kind: str, case: str) -> Any:
    """Of this rank: loss, gradients, collectives. One more token than counts each, the first, is no valid one."""
    counts = [n + 1 for n in TOKENS[case]]
    first, own = sum(counts[: comm.rank()]), counts[comm.rank()]
    t = tensors(vocabulary, sum(counts))
    here, rows = slice(first, first + own), rows_of(vocabulary, comm.rank())
    x = [t["hidden"][here].requires_grad_(), t["weight"].requires_grad_(), t["bias"].requires_grad_()]
    valid = torch.arange(own) > 0
    how = Divergence(kind, 2.0)
    comm.calls.clear()
    loss = split_loss(x[0], Head(*x[1:]), t["teacher"][here], Head(t["theirs"][rows]), how, valid, chunk_tokens=8)
    live = bool(valid.any())  # a dummy micro-batch is weighted zero
    return loss.detach(), torch.autograd.grad(loss * (SLOPE if live else 0.0), x), dict(comm.calls)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_whole_output_layers(ranks, kind):
    for n in (1, 2, 3, 4):
        for vocabulary, case in ((23, "unequal"), (2, "unequal"), (23, "a rank without"), (23, "none")):
            counts = TOKENS[case][:n]
            t = tensors(vocabulary, sum(TOKENS[case]) + 4)
            x = [t[name].requires_grad_() for name in ("hidden", "weight", "bias")]
            valid = torch.cat([torch.arange(count + 1) > 0 for count in TOKENS[case]])
            valid[sum(counts) + n :] = False
            loss, parts = head_loss(
                x[0], Head(*x[1:]), t["teacher"], Head(t["theirs"]), Divergence(kind, 2.0), valid=valid
            )
            hidden, *layer = torch.autograd.grad(loss * SLOPE, x)
            results = ranks(n, split, vocabulary, kind, case)
            chunks = max(-(-sum(counts) // 8), 1)
            calls = {"all_gather": 3, "all_reduce": 1 + chunks * (3 if kind == "jensen_shannon" else 2)}
            for r, (own, grads, called) in enumerate(results):
                here = slice(sum(counts[:r]) + r, sum(counts[: r + 1]) + r + 1)
                assert torch.allclose(own, parts[here].sum(0)[0], rtol=1e-12, atol=1e-14) and called == calls
                assert torch.allclose(grads[0], hidden[here], rtol=1e-12, atol=1e-13)
                others = torch.ones(vocabulary, dtype=torch.bool)
                others[vocabulary * r // n : vocabulary * (r + 1) // n] = False
                assert not grads[1][others].any()
            for i, right in enumerate(layer):  # what data parallel makes of them
                found = torch.stack([grads[1 + i] for _, grads, _ in results]).sum(0)
                assert torch.allclose(found, right, rtol=1e-12, atol=1e-13)
            assert case == "none" or bool(hidden.any())


def of_two_dtypes() -> Any:
    t = {name: x.float() for name, x in tensors(23, 4).items()}
    hidden, weight = t["hidden"].bfloat16().requires_grad_(), t["weight"].requires_grad_()
    rows = Head(t["theirs"][rows_of(23, comm.rank())])
    loss = split_loss(hidden, Head(weight), t["teacher"], rows, Divergence(), torch.ones(4, dtype=torch.bool))
    right, _ = head_loss(hidden, Head(weight), t["teacher"].bfloat16(), Head(t["theirs"]), Divergence())
    return loss.detach(), right.detach(), [g.dtype for g in torch.autograd.grad(loss, [hidden, weight])]


def test_hidden_states_of_a_student_in_bfloat16_travel_with_those_of_a_teacher_in_float32(ranks):
    for loss, right, dtypes in ranks(2, of_two_dtypes):
        assert torch.allclose(loss, right, rtol=2e-2) and dtypes == [torch.bfloat16, torch.float32]


SIZES = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
RUN = [
    "data=text_file", "data.sequence_length=24", "task=causal_lm", "task.fused_head=true", "model=llama", "optim=adamw",
    "logger=none", "model.kwargs.hidden_size=16", "train.global_batch_size=20", "train.micro_batch_size=4",
    "train.max_steps=3", "train.log_every_steps=1", "export=[]", "distillation=logits", "distillation.temperature=2.0",
    "model@distillation.teacher.model=llama", "distillation.teacher.model.kwargs.hidden_size=32",
    *(f"{place}model.kwargs.{k}={v}" for place in ("", "distillation.teacher.") for k, v in SIZES.items()),
]  # fmt: skip
PARAMETERS = 10_512  # of the student, a bucket of data parallel
VOCABULARY, CHUNK = 259, 40  # tokens of a chunk, of a vocabulary that is split; the labels' chunks have a share of it
PADDED = [
    "distillation.teacher.model.weights={}/padded.safetensors", "+distillation.teacher.model.kwargs.vocab_size=300",
    "+distillation.options.num_classes=259",
]  # fmt: skip
TIED = [
    "distillation.teacher.model.weights={}/tied.safetensors",
    "+distillation.teacher.model.kwargs.tie_word_embeddings=true",
]  # fmt: skip


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator makes, but for those as large as an output layer."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.bytes = sizes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *(n for n in found if n not in self.sizes)])
        return out


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and weights of teachers: one of the data's vocabulary, a padded one, one with a tied output layer."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("".join(f"line {i} of a text of {i * i} letters\n" for i in range(60)))
    (folder / "test.txt").write_text("".join(f"letter {i} of {i * i}\n" for i in range(20)))
    for name, vocabulary in (("plain", 259), ("padded", 300), ("tied", 259)):
        kwargs = {**SIZES, "hidden_size": 32, "tie_word_embeddings": name == "tied"}
        model = models.build(ModelConfig("hf", "llama", "causal_lm", kwargs=kwargs), vocabulary, 5, vocabulary)
        state = {n: t.clone() * 3 for n, t in model.state_dict().items() if name != "tied" or "lm_head" not in n}
        save_file(state, folder / f"{name}.safetensors")
    return folder


def whole_run(folder: str, run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run
    from dist_compress.distillation import head, vocabulary
    from dist_compress.training.loop import Trainer

    outcome.LATENCY_S, kept = 0.05, (head.CHUNK_ELEMENTS, vocabulary.CHUNK_ELEMENTS, Trainer._gradients)
    head.CHUNK_ELEMENTS = vocabulary.CHUNK_ELEMENTS = CHUNK * -(-VOCABULARY // comm.world_size())
    layers = {4 * VOCABULARY * width for width in (16, 32)} | {4 * 300 * 32}
    largest, seen = Largest(layers), {}

    def watched(self: Trainer, step: int) -> Any:
        comm.calls.clear()
        with largest:
            means = kept[2](self, step)
        teacher = next(m for m in self.methods if hasattr(m, "teacher")).teacher.model
        seen.update(calls=dict(comm.calls), rows=len(teacher.lm_head.weight), held=_bytes(teacher))
        return means

    Trainer._gradients = watched
    Path(run_dir).mkdir(exist_ok=True)
    given = ["distillation.teacher.model.weights={}/plain.safetensors", *RUN, "data.root={}", *overrides]
    try:
        run.run(compose.compose(compose.parse([word.replace("{}", folder) for word in given] + [f"run_dir={run_dir}"])))
    finally:
        head.CHUNK_ELEMENTS, vocabulary.CHUNK_ELEMENTS, Trainer._gradients = kept
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    series = [line for line in lines if "train/loss" in line]
    return {**seen, "largest": largest.bytes, "series": series, "lines": lines}


def _bytes(model: Any) -> int:
    """Of the storages that the parameters keep alive."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def close(found: dict[str, Any], right: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert len(found["series"]) == len(right["series"]) == 3
    for line, other in zip(found["series"], right["series"], strict=True):
        for key in ("train/loss", "train/task_loss", "train/logits_loss"):
            assert line[key] == pytest.approx(other[key], rel=tolerance), key
    assert right["series"][0]["train/logits_loss"] > 0.1


SPLIT = "distillation.teacher.mode=vocab"


def test_a_run_learns_the_same_as_with_whole_output_layers(ranks, tmp_path, material):
    """Five micro-batches: at 2 and 3 ranks some have a dummy in the last round."""
    online, dense = (
        ranks(1, whole_run, str(material), str(tmp_path / f"online_{fused}"), f"task.fused_head={fused}")[0]
        for fused in (True, False)
    )
    assert dense["largest"] >= 4 * (4 * 24) * VOCABULARY  # the measure sees whole logits
    for n in (1, 2, 3):
        results = ranks(n, whole_run, str(material), str(tmp_path / str(n)), SPLIT)
        close(results[0], online)
        rows, tokens = -(-VOCABULARY // n), 4 * 24
        assert sum(r["rows"] for r in results) == VOCABULARY
        for r in results:
            assert online["held"] - r["held"] == (VOCABULARY - r["rows"]) * 32 * 4
            assert r["largest"] <= 4 * max(CHUNK * rows, n * tokens * (16 + 32), PARAMETERS) < 4 * tokens * VOCABULARY
        rounds, chunks = -(-5 // n), [-(-min(n, 5 - first) * tokens // CHUNK) for first in range(0, 5, n)]
        sums = results[0]["calls"]
        assert sums["all_reduce"] == 1 + rounds + 2 * sum(chunks)  # of the counts of tokens; a round; a chunk
        assert sums["all_gather"] == 3 * rounds + 1  # and the statistics of the step


@pytest.mark.parametrize("more", [PADDED, TIED], ids=["padded", "tied"])
def test_a_padded_vocabulary_and_a_tied_output_layer(ranks, tmp_path, material, more):
    online = ranks(1, whole_run, str(material), str(tmp_path / "online"), *more)[0]
    first, second = ranks(2, whole_run, str(material), str(tmp_path / "vocab"), SPLIT, *more)
    close(first, online)
    assert (first["rows"], second["rows"]) == (129, 130)
    if more is TIED:  # the input embedding is needed whole, and is there once
        assert first["held"] == second["held"] == online["held"]


REFUSED = {
    "exact": (["train.exact=true"], "train.exact=true promises equal bits"),
    "whole logits": (["task.fused_head=false"], "Set task.fused_head=true"),
    "dist": (["distillation.method=dist", "~distillation.options.kind"], "method='dist' compares none, or whole ones"),
    "hidden states alone": (
        ["distillation.method=null", "~distillation.options.kind",
         "distillation.config_list=[{op_names: [model.layers.0], method: fitnets}]"],
        "method=None compares none",
    ),
    "classes": (["model=resnet20", "data=digits", "task=classification"], "task.fused_head=true belongs to causal_lm"),
    "no rows": (["distillation.teacher.mode=rows"], "Available: online, vocab, store, self"),
}  # fmt: skip


def refusals(folder: str, run_dir: str) -> dict[str, str]:
    from dist_compress import compose, run

    found = {}
    for name, (more, _) in REFUSED.items():
        sizes = [word for word in RUN if not (name == "classes" and word.startswith("model.kwargs"))]
        words = ["distillation.teacher.model.weights={}/plain.safetensors", *sizes, "data.root={}", SPLIT, *more]
        try:
            run.Job(compose.compose(compose.parse([w.replace("{}", folder) for w in words] + [f"run_dir={run_dir}"])))
            found[name] = "no error"
        except UserError as error:
            found[name] = str(error)
    return found


def test_what_cannot_be_split_is_refused_on_every_rank(ranks, tmp_path, material):
    first, second = ranks(2, refusals, str(material), str(tmp_path))
    assert first == second
    for name, (_, said) in REFUSED.items():
        assert said in first[name], (name, first[name])
