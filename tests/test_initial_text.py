"""A Llama from a folder of Hugging Face's on sharded backends: rotary buffers, tied embeddings, hidden states that are
distilled, heads that are pruned, weights that are quantized, as on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import killed_at

from dist_compress import models
from dist_compress.config import ModelConfig
from dist_compress.initial import inventory

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
RUN = [
    "logger=none", "optim=adamw", "data=text_file", "data.sequence_length=24", "data.root={}", "task=causal_lm",
    "model=hf", "model.name={}/llama", "model.head=causal_lm", "train.exact=true", "train.global_batch_size=20",
    "train.micro_batch_size=4", "train.eval_batch_size=8", "train.max_steps=6", "export=[]",
]  # fmt: skip
PRUNED = [
    "pruning=transformer", "pruning.method=l2_norm", "pruning.schedule.start=0", "pruning.schedule.end=4steps",
    "pruning.schedule.num_decisions=2",
]  # fmt: skip
TAUGHT = [
    "distillation=logits", "model@distillation.teacher.model=hf", "distillation.teacher.model.name={}/llama",
    "distillation.teacher.model.head=causal_lm",
    "distillation.config_list=[{op_names_re: ['model.layers.[0-9]+'], method: fitnets}]",
]  # fmt: skip
QUANTIZED = [
    "quantization=qat", "quantization.calibration_steps=1",
    "quantization.config_list=[{op_types: [Linear], target_names: [weight], quant_dtype: int4}, "
    "{op_types: [Linear], target_names: [_input_0], quant_dtype: int8}]",
]  # fmt: skip
WAYS = {"taught": [*PRUNED, *TAUGHT], "quantized": [*PRUNED, *QUANTIZED]}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    for split, count in (("train", 60), ("test", 18)):
        (folder / f"{split}.txt").write_text("".join(f"line {i} of {i * i} words\n" for i in range(count)))
    kwargs = {**SIZES, "num_key_value_heads": 2, "vocab_size": 259, "tie_word_embeddings": True}
    model: Any = models.build(ModelConfig("hf", "llama", "causal_lm", kwargs=kwargs), 2, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder / "llama")
    return folder


def whole_run(material: str, run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    given = [word.replace("{}/", f"{material}/").replace("={}", f"={material}") for word in (*RUN, *overrides)]
    run.run(compose.compose(compose.parse([*given, f"run_dir={run_dir}"])))
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [value for row in rows for name, value in row.items() if name.startswith("train/") and "loss" in name]
    return {
        **json.loads((Path(run_dir) / "summary.json").read_text()),
        "losses": losses,
        "events": (Path(run_dir) / "events.jsonl").read_text(),
    }


def killed_run(material: str, run_dir: str, step: int, *overrides: str) -> None:
    with killed_at(step):
        whole_run(material, run_dir, "checkpoint.every_steps=1", *overrides)


def bits(found: dict[str, Any]) -> dict[str, Any]:
    names = ("fingerprint/plan", "fingerprint/weights", "loss/before", "loss/masked", "loss/shrunk", "loss/after",
             "macs/before", "macs/after", "params/before")  # fmt: skip
    return {name: found[name] for name in names}


@pytest.mark.parametrize("way", WAYS)
def test_as_on_one_rank(ranks: Any, tmp_path: Path, material: Path, way: str) -> None:
    words = WAYS[way]
    one = ranks(1, whole_run, str(material), str(tmp_path / "one"), *words)[0]
    assert one["macs/after"] < 0.9 * one["macs/before"]
    two = ranks(2, whole_run, str(material), str(tmp_path / "two"), *words, "backend=fsdp")[0]
    assert bits(two) == bits(one) and two["losses"] == one["losses"]
    assert "every rank builds" not in two["events"]
    ranks(2, killed_run, str(material), str(tmp_path / "killed"), 5, *words, "backend=fsdp")
    again = ranks(
        3, whole_run, str(material), str(tmp_path / "killed"), *words, "checkpoint.every_steps=1", "backend=fsdp"
    )
    assert bits(again[0]) == bits(one)


def test_zero_is_close_to_one_rank(ranks: Any, tmp_path: Path, material: Path) -> None:
    words = [*WAYS["taught"], "train.exact=false"]
    one = ranks(1, whole_run, str(material), str(tmp_path / "one"), *words)[0]
    how = ("backend=deepspeed", "backend.stage=3")
    two = ranks(2, whole_run, str(material), str(tmp_path / "two"), *words, *how)[0]
    assert two["fingerprint/plan"] == one["fingerprint/plan"] and two["losses"] == pytest.approx(
        one["losses"], rel=1e-5
    )


def test_a_folder_of_weights_is_built_on_the_meta_device(material: Path) -> None:
    """The same modules, tied as they are; no weights are read."""
    config = ModelConfig("hf", str(material / "llama"), "causal_lm")
    whole = models.build(config, 2, 0)
    with torch.device("meta"):
        bare = models.build(config, 2, 0)
    assert inventory(bare) == inventory(whole)
    assert all(p.is_meta for p in bare.parameters()) and not any(p.is_meta for p in whole.parameters())
