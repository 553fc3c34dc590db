"""Text: what a sample is, at any number of ranks; tokenizers; files and folders that will not do; the tasks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dist_compress import comm
from dist_compress.config import DataConfig, ModelConfig, TaskConfig
from dist_compress.errors import UserError
from dist_compress.training import data, task
from dist_compress.training.data.text import python_reference
from dist_compress.training.data.tokenizer import Bytes, HuggingFace, Words, check_vocabulary
from dist_compress.training.evaluation import evaluate

TEXT = "To be, or not to be, that is the question: whether 'tis nobler. " * 9 + "End"


def hf_tokenizer(folder: Path, words: tuple[str, ...] = ("to", "be", "or", "not", ",")) -> str:
    """Of words, with marks for an encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words))}
    own = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", eos_token="[SEP]").save_pretrained(folder)
    return str(folder)


def text_file(root: Path | str | None, **options: Any) -> data.Data:
    name = None if root is None else str(root)
    return data.build(DataConfig(source="text_file", root=name, **{"sequence_length": 16, **options}), seed=0)


def test_every_token_but_the_first_is_predicted_once(tmp_path: Path):
    (tmp_path / "text").write_text(TEXT)
    built = text_file(tmp_path / "text")
    whole = torch.tensor([*(byte + 3 for byte in TEXT.encode()), 1])
    assert (built.num_classes, built.vocab_size) == (259, 259)
    num_windows = -(-(len(whole) - 1) // 16)
    windows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for split in (built.train, built.eval):
        batch = split.batch(torch.arange(split.num_samples), 0)
        for place, number in enumerate(split.numbers.tolist()):
            assert number not in windows
            windows[number] = (batch["inputs"]["input_ids"][place], batch["targets"][place])
    assert sorted(windows) == list(range(num_windows))
    assert [n for n in windows if n % 10 == 9] == built.eval.numbers.tolist()
    inputs = torch.cat([windows[n][0] for n in range(num_windows)])
    targets = torch.cat([windows[n][1] for n in range(num_windows)])
    valid = targets != -100
    assert torch.equal(targets[valid], whole[1:]) and not bool(valid[len(whole) - 1 :].any())
    assert torch.equal(inputs[: len(whole)], whole) and bool((inputs[len(whole) :] == 0).all())


def test_a_folder_has_its_own_held_out_text(tmp_path: Path):
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "val.txt").write_text("another text " * 3)
    built = text_file(tmp_path, tokenizer="words")
    assert built.eval.num_samples == 1 and built.train.num_samples == 11
    assert built.eval.batch(torch.tensor([0]), None)["targets"].tolist() == [[3, 3, 3, 3, 3, 1, *[-100] * 10]]


def test_the_embedded_text_has_no_paragraph_twice():
    paragraphs = [p.strip() for text in python_reference().values() for p in text.split("\n\n")]
    assert len(paragraphs) > 1500 and len(set(paragraphs)) == len(paragraphs)
    built = text_file(None, sequence_length=128)
    assert built.train.num_samples > 2000 and 200 < built.eval.num_samples < built.train.num_samples / 8


def test_tokenizers(tmp_path: Path):
    assert Bytes().document("a").tolist() == [100, 1]
    assert Bytes().sequence("abc", 4).tolist() == [2, 100, 101, 1]
    words = Words(["b a, a", "b"])
    assert words.vocab_size == 6 and words.document("a b, c").tolist() == [4, 5, 3, 3, 1]
    assert words.mark != Words(["b a, a"]).mark and words.mark == Words(["a b a b"]).mark
    own = HuggingFace(hf_tokenizer(tmp_path / "a"), "data.tokenizer")
    assert own.sequence("to be so", 9).tolist() == [2, 4, 5, 1, 3] and own.sequence("to be or", 4).tolist() == [
        2,
        4,
        5,
        3,
    ]
    assert own.document("to be").tolist() == [4, 5, 3] and (own.vocab_size, own.pad) == (9, 0)
    other = HuggingFace(hf_tokenizer(tmp_path / "b", ("be", "to")), "data.tokenizer")
    assert own.mark != other.mark and own.mark == HuggingFace(hf_tokenizer(tmp_path / "c"), "").mark


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("labels", [None, "kind"])
def test_a_data_set_of_hugging_face(tmp_path: Path, kind: str, labels: str | None):
    datasets = pytest.importorskip("datasets")
    rows = {"train": [("to be", "b"), ("or not", "a"), ("to to to to to to", "b")], "test": [("be", "a"), ("not", "b")]}
    parts = {
        n: datasets.Dataset.from_dict({"words": [t for t, _ in r], "kind": [k for _, k in r]}) for n, r in rows.items()
    }
    if kind == "arrow":
        datasets.DatasetDict(parts).save_to_disk(tmp_path)
    else:
        for name, part in parts.items():
            part.to_parquet(tmp_path / f"{name}-0.parquet")
    config = DataConfig(
        source="hf_dataset", root=str(tmp_path), sequence_length=6, text_column="words", label_column=labels
    )
    config.tokenizer = hf_tokenizer(tmp_path / "tokenizer")
    built = data.build(config, seed=0)
    if labels is None:
        assert built.train.batch(torch.tensor([0, 1]), 0)["targets"].tolist() == [
            [5, 3, 6, 7, 3, 4],
            [4, 4, 4, 4, 4, 3],
        ]
        return
    batch = built.train.batch(torch.tensor([2, 1]), 0)
    assert batch["targets"].tolist() == [1, 0] and built.num_classes == 2 and batch["ids"].tolist() == [2, 1]
    assert batch["inputs"]["input_ids"].tolist() == [[2, 4, 4, 4, 4, 3], [2, 6, 7, 3, 0, 0]]
    assert batch["inputs"]["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]


def test_chapters_of_the_reference_are_classes():
    built = data.build(DataConfig(source="text_folder", tokenizer="words", sequence_length=64), seed=0)
    assert built.num_classes == 8 and built.train.num_samples > 800 and len(set(built.eval.targets.tolist())) == 8
    (_, kwargs) = built.example(3)
    assert kwargs["input_ids"].shape == (3, 64) and bool(
        (kwargs["input_ids"][kwargs["attention_mask"] == 0] == 0).all()
    )


class Bigram(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(
            259, 259, _weight=torch.randn(259, 259, generator=torch.Generator().manual_seed(1))
        )

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


def measured(root: str, batch_size: int) -> dict[str, float]:
    return evaluate(Bigram(), text_file(root).eval, task.build(TaskConfig("causal_lm")), batch_size, "fp32")


def test_perplexity_is_that_of_all_tokens_at_any_number_of_ranks(ranks: Any, tmp_path: Path):
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "test.txt").write_text(TEXT[:75])  # five windows, the last one of 12 tokens
    tokens = torch.tensor([byte + 3 for byte in TEXT[:75].encode()] + [1])
    logits = Bigram()(tokens[:-1]).logits
    loss = F.cross_entropy(logits.double(), tokens[1:]).item()
    correct = float((logits.argmax(1) == tokens[1:]).double().mean())
    found = measured(str(tmp_path), 1)
    for key, value in {"loss": loss, "accuracy": correct, "perplexity": torch.tensor(loss).exp().item()}.items():
        assert found[key] == pytest.approx(value, rel=1e-5)
    for n in (2, 3):
        assert all(result == found for result in ranks(n, measured, str(tmp_path), 1))


def test_the_loss_of_a_language_model_is_divided_by_the_tokens_of_all_ranks(ranks: Any):
    lm = task.build(TaskConfig("causal_lm"))
    batch = {"targets": torch.tensor([[1, -100, 2], [-100, -100, -100]])}
    output = SimpleNamespace(logits=torch.arange(18.0).view(2, 3, 3).sin())
    expected = F.cross_entropy(output.logits.view(6, 3)[[0, 2]], torch.tensor([1, 2]), reduction="sum")
    assert torch.allclose(lm.loss(output, batch), expected) and lm.count(batch) == 2
    with pytest.raises(UserError, match="task.label_smoothing=0.1: belongs to classification"):
        task.build(TaskConfig("causal_lm", 0.1))
    for n in (1, 2, 3):
        assert ranks(n, counted) == [3 * 16 * 4 - 4] * n


def counted() -> int:
    """Of a global batch with the last, shorter window in one of its micro-batches."""
    from dist_compress.training.data.stream import Feed, Stream

    tokenizer = SimpleNamespace(vocab_size=9, mark="", pad=0)
    import numpy as np

    from dist_compress.training.data.text import Windows

    windows = Windows(np.arange(189, dtype=np.int32) % 9, torch.arange(12), 16, tokenizer, comm.device())
    return Feed(windows, Stream(12, 0, 12, 4), 3).global_count(task.build(TaskConfig("causal_lm")), 0)


def test_what_cannot_be_read_names_the_key(tmp_path: Path):
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    for source, options, words in [
        ("text_file", {"root": "nowhere"}, "data.root='nowhere': there is no such file"),
        ("text_file", {"root": "binary"}, "binary cannot be read as text in UTF-8"),
        ("text_file", {"root": "empty"}, "needs train.txt and test.txt"),
        ("text_file", {"root": "short.txt"}, "4 tokens in all are too few"),
        ("text_file", {"tokenizer": "empty"}, "data.tokenizer='.*empty': no tokenizer there"),
        ("text_file", {"augment": "pad_crop"}, "text is not augmented"),
        ("text_folder", {"root": "empty"}, "data.root='.*empty': needs the folders train and test"),
        ("hf_dataset", {}, "data.root is not set"),
        ("hf_dataset", {"root": "empty"}, "no data set there"),
    ]:
        for key in ("root", "tokenizer"):
            if key in options:
                options[key] = str(tmp_path / options[key]) if options[key] != "nowhere" else "nowhere"
        with pytest.raises(UserError, match=words):
            data.build(DataConfig(source=source, **options), seed=0)


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path):
    from dist_compress import models

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(source="hf", name="llama", head="causal_lm", kwargs=sizes)
    split = SimpleNamespace(vocab_size=40, tokenizer="bytes")
    check_vocabulary(models.build(config, 40, 0, 40), config, split, "model")
    with pytest.raises(UserError, match="^model: its vocabulary has 39 entries, and the tokens of the data number 40"):
        check_vocabulary(models.build(config, 40, 0, 39), config, split, "model")
    folder = tmp_path / "model"
    models.build(config, 40, 0, 40).save_pretrained(folder)
    own = ModelConfig(source="hf", name=str(folder), head="causal_lm")
    model = models.build(own, 40, 0, 40)
    check_vocabulary(model, own, split, "model")
    mark = HuggingFace(hf_tokenizer(folder), "").mark
    check_vocabulary(model, own, SimpleNamespace(vocab_size=9, tokenizer=mark), "model")
    with pytest.raises(UserError, match=r"distillation.teacher.model.name=.*is not that of the data"):
        check_vocabulary(model, own, split, "distillation.teacher.model")
