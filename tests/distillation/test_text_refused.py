"""Students and teachers of text that do not go together: one message, the same on every rank, before any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from dist_compress import models
from dist_compress.config import ModelConfig
from dist_compress.errors import UserError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
COMMON = [
    "logger=none", "optim=adamw", "data.sequence_length=16", "data.tokenizer=null", "train.global_batch_size=12",
    "train.micro_batch_size=4", "train.max_steps=2", "distillation=logits", "distillation.temperature=2.0",
]  # fmt: skip
LLAMA = [
    *COMMON, "data=text_file", "task=causal_lm", "model=llama", "model@distillation.teacher.model=llama",
    "distillation.teacher.model.weights={}/llama_259.safetensors",
]  # fmt: skip
TEACHER = "model@distillation.teacher.model=hf"
FOLDER = [
    *(TEACHER if word.startswith("model@") else word for word in LLAMA if "weights" not in word),
    "distillation.teacher.model.name={}/folder", "distillation.teacher.model.head=causal_lm",
]  # fmt: skip
BERT = [
    *COMMON, "data=text_folder", "model=bert", "model@distillation.teacher.model=bert",
    "distillation.teacher.model.weights={}/bert_259.safetensors",
]  # fmt: skip
LINK = "distillation.config_list=[{op_names: [bert.encoder.layer.0], method: fitnets, link: %s}]"
REFUSED = {
    "smaller vocabulary": (
        [*LLAMA, "distillation.teacher.model.weights={}/llama_99.safetensors",
         "+distillation.teacher.model.kwargs.vocab_size=99"],
        "distillation.teacher.model: its vocabulary has 99 entries, and the tokens of the data number 259",
    ),
    "larger vocabulary": (
        [*LLAMA, "distillation.teacher.model.weights={}/llama_300.safetensors",
         "+distillation.teacher.model.kwargs.vocab_size=300"],
        "distillation.teacher: it has 300 classes, the student 259",
    ),
    "tokenizer": (
        FOLDER,
        "the tokenizer in this folder is not that of the data",
    ),
    "folder of another model": (
        [*FOLDER, "+distillation.teacher.model.kwargs.num_hidden_layers=2"],
        "in this folder do not fit LlamaForCausalLM:\n  9 missing: model.layers.1.input_layernorm.weight",
    ),
    "file of another model": (
        [*LLAMA, "distillation.teacher.model.weights={}/bert_259.safetensors"],
        "distillation.teacher.model.weights='{}/bert_259.safetensors' does not fit the model LlamaForCausalLM",
    ),
    "student of another folder": (
        [*LLAMA, "model.name={}/folder", "+model.kwargs.vocab_size=99"],
        "2 of another shape: lm_head.weight (folder [300, 16], model [99, 16])",
    ),
    "classes": (
        [*BERT, "distillation.teacher.model.num_classes=5", "distillation.teacher.model.weights={}/bert_5.safetensors"],
        "distillation.teacher: it has 5 classes, the student 8",
    ),
    "random teacher": ([*BERT, "distillation.teacher.model.weights=null"], "with random weights teaches noise"),
    "no module": ([*BERT, LINK % "bert.encoder.layer.7"], "the teacher has no module 'bert.encoder.layer.7'"),
    "shapes": ([*BERT, LINK % "bert.pooler"], "no translation joins them"),
    "whole logits": (
        [*LLAMA, "distillation.method=dist", "~distillation.options.kind", "task.fused_head=true"],
        "distillation.method='dist' needs whole logits",
    ),
    "fused classes": ([*BERT, "task.fused_head=true"], "task.fused_head=true belongs to causal_lm"),
    "temperature": (
        [*LLAMA, "distillation=stored", "distillation.teacher.store={}/store", "distillation.temperature=3.0"],
        "temperature 3: the stored top-8 serves 1.0, 2.0 only",
    ),
    "store of other text": (
        [*LLAMA, "distillation=stored", "distillation.teacher.store={}/store", "data.sequence_length=20"],
        "was written for other inputs: data was",
    ),
    "store of other tokens": (
        [*LLAMA, "distillation=stored", "distillation.teacher.store={}/store", "data.tokenizer=words"],
        "tokenizer was 'bytes', now",
    ),
}  # fmt: skip


def config(folder: str, run_dir: str, overrides: list[str]) -> Any:
    from dist_compress import compose

    sizes = [
        f"{key}model.kwargs.{name}={value}" for key in ("", "distillation.teacher.") for name, value in SIZES.items()
    ]
    if "model=llama" in overrides:
        sizes += [f"{key}model.kwargs.num_key_value_heads=2" for key in ("", "distillation.teacher.")]
    if TEACHER in overrides or not any(o.startswith("model@") for o in overrides):
        sizes = [size for size in sizes if not size.startswith("distillation")]
    given = [o.replace("{}", folder) for o in overrides]
    if "distillation=stored" in given:
        given = [o for o in given if not o.startswith(("model@", "distillation.teacher.model", "distillation=logits"))]
        sizes = [size for size in sizes if not size.startswith("distillation")]
    return compose.compose(compose.parse([*given, *sizes, f"run_dir={run_dir}"]))


def refusals(folder: str) -> dict[str, str]:
    from dist_compress import run

    found = {}
    for name, (overrides, _) in REFUSED.items():
        try:
            run.Job(config(folder, f"{folder}/refused", overrides))
            found[name] = "no error"
        except UserError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of several sizes, a model with a tokenizer of its own, and a store of a top-8."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    from dist_compress import outcome, run

    folder = tmp_path_factory.mktemp("material")
    llama = ModelConfig("hf", "llama", "causal_lm", kwargs={**SIZES, "num_key_value_heads": 2})
    bert = ModelConfig("hf", "bert", "sequence_classification", kwargs=SIZES)
    for size in (99, 259, 300):
        model = models.build(llama, size, 0, size)
        save_file({n: t.clone() for n, t in model.state_dict().items()}, folder / f"llama_{size}.safetensors")
    for classes, name in ((5, "bert_5"), (8, "bert_259")):
        state = models.build(bert, classes, 0, 259).state_dict()
        save_file({n: t.clone() for n, t in state.items()}, folder / f"{name}.safetensors")
    models.build(llama, 300, 0, 300).save_pretrained(folder / "folder")
    own = Tokenizer(kinds.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(folder / "folder")
    outcome.LATENCY_S = 0.05
    (folder / "run").mkdir()
    store = ["write={}/store", "encoding=topk_u8", "k=8", "temperatures=[1.0,2.0]"]
    teacher = [o for o in COMMON if not o.startswith(("distillation", "train.max_steps"))]
    teacher += ["data=text_file", "task=causal_lm", "model=llama", "train.max_steps=0", "export=[]"]
    run.run(config(str(folder), str(folder / "run"), [*teacher, *(f"distillation.store.{key}" for key in store)]))
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_what_does_not_go_together_is_refused_on_every_rank(ranks: Any, material: Path, size: int):
    first, *others = ranks(size, refusals, str(material))
    for name, (_, said) in REFUSED.items():
        assert said.replace("{}", str(material)) in first[name], (name, first[name])
    assert all(other == first for other in others)


def test_what_goes_together_is_not(material: Path):
    from dist_compress import run

    for name, overrides in (("llama", LLAMA), ("bert", [*BERT, LINK % "bert.encoder.layer.0"])):
        (material / name).mkdir()
        run.Job(config(str(material), str(material / name), overrides)).reporter.close(finished=False)


def test_a_stored_token_of_a_large_vocabulary_takes_192_bytes():
    from dist_compress.config import StoreConfig
    from dist_compress.distillation.encoding import Encoding

    asked = StoreConfig()
    assert Encoding.choose("auto", 128_256, asked.k, tuple(asked.temperatures), asked.draws).record_bytes == 192
