"""`task.fused_head`: a language model in a run, with a teacher, learns the same without logits that are ever whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_compress.calling import Headless, call_headless, logits
from dist_compress.errors import UserError

TOKENS, VOCABULARY = 4 * 24, 259
SIZES = ["intermediate_size=24", "num_hidden_layers=1", "num_attention_heads=2", "num_key_value_heads=2"]
RUN = [
    "data=text_file", "data.sequence_length=24", "task=causal_lm", "model=llama", "optim=adamw", "logger=none",
    "model.kwargs.hidden_size=16", *(f"model.kwargs.{size}" for size in SIZES), "train.global_batch_size=20",
    "train.micro_batch_size=4", "train.max_steps=4", "train.log_every_steps=1", "export=[]",
]  # fmt: skip
LEARN = [
    "distillation=logits", "model@distillation.teacher.model=llama", "distillation.temperature=2.0",
    "distillation.teacher.model.kwargs.hidden_size=24",
    *(f"distillation.teacher.model.kwargs.{size}" for size in SIZES),
]  # fmt: skip


class Largest(TorchDispatchMode):
    """The most rows of a vocabulary that any operator makes, in training and evaluation."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] == VOCABULARY]
        self.rows = max([self.rows, *(t.numel() // VOCABULARY for t in found)])
        return out


def whole_run(folder: str, corpus: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run
    from dist_compress.distillation import head
    from dist_compress.distillation.methods import logits as method
    from dist_compress.training.loop import Trainer

    outcome.LATENCY_S, kept = 0.05, (head.CHUNK_ELEMENTS, method.CHUNK_ELEMENTS, Trainer._gradients)
    head.CHUNK_ELEMENTS = method.CHUNK_ELEMENTS = 32 * VOCABULARY
    largest = Largest()

    def watched(self: Trainer, step: int) -> Any:
        with largest:
            return kept[2](self, step)

    Trainer._gradients = watched
    Path(folder).mkdir(exist_ok=True)
    try:
        run.run(compose.compose(compose.parse([*RUN, f"data.root={corpus}", *overrides, f"run_dir={folder}"])))
    finally:
        head.CHUNK_ELEMENTS, method.CHUNK_ELEMENTS, Trainer._gradients = kept
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((Path(folder) / "summary.json").read_text())
    return {"summary": summary, "rows": largest.rows, "series": [line for line in lines if "train/loss" in line]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a teacher of random weights."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("".join(f"line {i} of a text of {i * i} letters\n" for i in range(60)))
    (folder / "test.txt").write_text("".join(f"letter {i} of {i * i}\n" for i in range(20)))
    return folder


@pytest.fixture(scope="module")
def teacher(ranks: Any, corpus: Path) -> str:
    overrides = ["model.kwargs.hidden_size=24", "export=[safetensors]", "distillation.store.temperatures=[2.0]"]
    overrides += [f"distillation.store.write={corpus / 'store'}", "distillation.store.encoding=topk_u8"]
    ranks(1, whole_run, str(corpus / "teacher"), str(corpus), *overrides)
    return str(corpus / "teacher/model.safetensors")


def close(found: dict[str, Any], right: dict[str, Any], tolerance: float) -> None:
    assert len(found["series"]) == len(right["series"]) == 4
    for line, other in zip(found["series"], right["series"], strict=True):
        for key in ("train/loss", "train/task_loss", "train/logits_loss", "train/accuracy"):
            assert line[key] == pytest.approx(other[key], rel=tolerance), key
    assert found["summary"]["perplexity/after"] == pytest.approx(right["summary"]["perplexity/after"], rel=tolerance)


@pytest.mark.parametrize("stored", [False, True])
def test_a_fused_head_learns_the_same_and_never_holds_all_logits(ranks, tmp_path, corpus, teacher, stored):
    keys = [*LEARN, f"distillation.teacher.model.weights={teacher}"]
    if stored:
        keys = ["distillation=stored", f"distillation.teacher.store={corpus / 'store'}", "distillation.temperature=2.0"]
    plain = ranks(1, whole_run, str(tmp_path / "plain"), str(corpus), "train.exact=true", *keys)[0]
    fused = ["task.fused_head=true", *keys]
    one = ranks(1, whole_run, str(tmp_path / "one"), str(corpus), "train.exact=true", *fused)[0]
    close(one, plain, 1e-5)
    assert plain["rows"] == TOKENS and one["rows"] == 32  # of a chunk; tensors as wide as the vocabulary
    for n in () if stored else (2, 3):
        several = ranks(n, whole_run, str(tmp_path / f"{n}"), str(corpus), "train.exact=true", *fused)[0]
        assert several["summary"]["fingerprint/weights"] == one["summary"]["fingerprint/weights"]
        if n == 2:  # behind DistributedDataParallel, which must see that the output layer was used
            ddp = ranks(n, whole_run, str(tmp_path / "ddp"), str(corpus), "train.exact=false", *fused)[0]
            close(ddp, plain, 1e-4)


class Scaled(nn.Module):
    """Does something to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(3, 3), nn.Linear(3, 7)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.body(x)) / 2


class Plain(Scaled):
    def forward(self, x: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.lm_head(self.body(x))})()


def test_the_output_layer_is_left_out_for_one_call():
    model, x = Plain(), torch.randn(2, 3)
    right = model(x).logits
    found = logits(call_headless(model, x, "task.fused_head"))
    assert isinstance(found, Headless)
    assert torch.equal(nn.functional.linear(found.hidden, found.weight, found.bias), right)
    assert torch.equal(model(x).logits, right)


def test_what_has_no_plain_output_layer_is_refused():
    x = torch.randn(2, 3)
    with pytest.raises(UserError, match="task.fused_head=true: Scaled changes its logits after the output layer"):
        call_headless(model := Scaled(), x, "task.fused_head")
    assert model(x).shape == (2, 7)
    with pytest.raises(UserError, match="task.fused_head=true: Linear has no get_output_embeddings"):
        call_headless(nn.Linear(3, 3), x, "task.fused_head")
    model = Plain()
    model.lm_head.register_forward_hook(lambda *a: None)
    with pytest.raises(UserError, match="the output of the last layer is a target itself"):
        call_headless(model, x, "task.fused_head")
