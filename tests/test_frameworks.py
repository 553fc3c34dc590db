"""The examples of docs/own_loop.md inside loops of others, run as they stand: Hugging Face Trainer, Lightning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_compress

PAGE = Path(__file__).parents[1] / "docs" / "own_loop.md"


def example_with(words: str) -> str:
    """The one Python block of the page that has these words."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if words in block]
    return block


def recipe(names: str) -> dict[str, Any]:
    schedule = {"name": "linear", "start": "2steps", "end": "6steps", "num_decisions": 3}
    entries = [{"op_names_re": [names]}]
    return {"pruning": {"method": "taylor", "sparse_ratio": 0.5, "schedule": schedule, "config_list": entries}}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_hugging_face_trainer(tmp_path: Path, accumulated: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **sizes))
    dataset = [{"input_ids": torch.randint(0, 40, (8,)), "labels": i % 2} for i in range(32)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=accumulated,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    example = {"input_ids": torch.ones(2, 8).long()}
    names = {
        "transformers": transformers, "dist_compress": dist_compress, "model": model, "arguments": arguments,
        "dataset": dataset, "recipe": recipe(r".*intermediate\.dense"), "example": example,
    }  # fmt: skip
    exec(compile(example_with("transformers.Trainer"), str(PAGE), "exec"), names)
    small, finished, compression = names["small"], names["finished"], names["trainer"].compression
    assert compression.step_count == 8 and finished.difference <= 1e-5
    assert [d["step"] for d in finished.results["decisions"]] == [2, 4, 6]
    assert [layer.intermediate.dense.out_features for layer in small.bert.encoder.layer] == [16, 16]
    old = [p.clone() for p in small.parameters()]
    compression.optimizer.zero_grad()
    for group in compression.optimizer.param_groups:
        group["lr"] = 0.01  # the Trainer has taken it to 0
    small(**example, labels=torch.tensor([0, 1])).loss.backward()
    compression.step()  # the optimizer of the Trainer goes on with the small parameters
    assert not all(torch.equal(a, b) for a, b in zip(old, small.parameters(), strict=True))


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it logs and keeps checkpoints
    lightning = pytest.importorskip("lightning")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    samples = [(torch.randn(16), i % 4) for i in range(64)]
    names = {
        "lightning": lightning, "dist_compress": dist_compress, "torch": torch, "nn": nn, "model": model,
        "recipe": recipe("0"), "example": (torch.randn(2, 16),),
        "loader": torch.utils.data.DataLoader(samples, batch_size=8, shuffle=True),
    }  # fmt: skip
    exec(compile(example_with("lightning.Trainer"), str(PAGE), "exec"), names)
    small, finished, compression = names["small"], names["finished"], names["module"].compression
    assert compression.step_count == 40 and finished.difference <= 1e-5
    assert [d["step"] for d in finished.results["decisions"]] == [2, 4, 6]
    assert small[0].out_features == 16 and small[3].in_features == 16
