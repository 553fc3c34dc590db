"""Whole runs of a Llama and a BERT: heads and hidden units go while both learn from a teacher; equal bits on any number
of ranks, masked equals shrunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from dist_compress import models
from dist_compress.config import ModelConfig

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"llama": "causal_lm", "bert": "sequence_classification"}
RUN = [
    "logger=none", "optim=adamw", "pruning=transformer", "pruning.schedule.start=2steps", "pruning.schedule.end=4steps",
    "pruning.schedule.num_decisions=2", "distillation=logits", "train.exact=true", "train.global_batch_size=20",
    "train.micro_batch_size=4", "train.eval_batch_size=8", "train.max_steps=6", "data.root={}/text",
]  # fmt: skip
OWN = {
    "llama": ["data=text_file", "data.sequence_length=24", "task=causal_lm", "task.fused_head=true"],
    "bert": [
        "data=text_folder", "data.sequence_length=16",
        "distillation.config_list=[{op_names_re: ['bert.encoder.layer.[0-9]+'], method: fitnets}]",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and weights of both."""
    folder = tmp_path_factory.mktemp("material")
    for split, count in (("train", 30), ("test", 9)):
        for label in ("odd", "even"):
            (folder / "text" / split / label).mkdir(parents=True)
            for i in range(count):
                text = f"number {2 * i + (label == 'odd')}" + " again" * (i % 5)
                (folder / "text" / split / label / f"{i}.txt").write_text(text)
        (folder / "text" / f"{split}.txt").write_text("".join(f"line {i} of {i * i} words\n" for i in range(2 * count)))
    for name, head in HEADS.items():
        more = {"num_key_value_heads": 2} if name == "llama" else {}
        vocabulary = 259 if name == "llama" else 40
        config = ModelConfig("hf", name, head, kwargs={**SIZES, **more, "vocab_size": vocabulary})
        state = models.build(config, 2, 0).state_dict()
        save_file({n: t.clone() for n, t in state.items()}, folder / f"{name}.safetensors")
    return folder


def whole_run(name: str, material: str, run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    sizes = {**SIZES, "num_key_value_heads": 2} if name == "llama" else {**SIZES, "+vocab_size": 40}
    words = [*RUN, *OWN[name], f"model={name}", f"model@distillation.teacher.model={name}"]
    for place in ("model", "distillation.teacher.model"):
        words.append(f"{place}.weights={material}/{name}.safetensors")
        for size, value in sizes.items():
            words.append(f"{'+' * size.startswith('+')}{place}.kwargs.{size.lstrip('+')}={value}")
    given = [word.replace("{}", material) for word in (*words, *overrides)]
    run.run(compose.compose(compose.parse([*given, f"run_dir={run_dir}"])))
    return json.loads((Path(run_dir) / "summary.json").read_text())


@pytest.mark.parametrize(("name", "sizes"), [("llama", (2, 3)), ("bert", (3,))])
def test_pruned_with_a_teacher(ranks: Any, tmp_path: Path, material: Path, name: str, sizes: tuple[int, ...]):
    one = ranks(1, whole_run, name, str(material), str(tmp_path / "one"))[0]
    assert one["macs/after"] < 0.8 * one["macs/before"] and one["verify/max_rel_diff"] <= 1e-5
    assert ("perplexity/after" in one) == (name == "llama") and one["export/safetensors/max_rel_diff"] <= 1e-6
    for n in sizes:
        other = ranks(n, whole_run, name, str(material), str(tmp_path / str(n)))[0]
        for key in ("fingerprint/plan", "fingerprint/masks", "fingerprint/weights", "loss/masked", "loss/after"):
            assert other[key] == one[key], (n, key)


def test_pruned_with_a_vocabulary_split_over_the_ranks(ranks: Any, tmp_path: Path, material: Path):
    """And hidden states beside it; what is cut and what is learned is as with whole output layers."""
    hidden = "distillation.config_list=[{op_names_re: ['model.layers.[0-9]+'], method: fitnets}]"
    more = ["train.exact=false", "pruning.method=l2_norm", "pruning.schedule.start=0", hidden]
    online = ranks(1, whole_run, "llama", str(material), str(tmp_path / "online"), *more)[0]
    more.append("distillation.teacher.mode=vocab")
    split = ranks(2, whole_run, "llama", str(material), str(tmp_path / "vocab"), *more)[0]
    for key in ("loss/masked", "loss/shrunk", "loss/after"):
        assert split[key] == pytest.approx(online[key], rel=1e-4), key
    assert split["macs/after"] == online["macs/after"] and split["verify/max_rel_diff"] <= 1e-5
