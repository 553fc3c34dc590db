"""Models by source and name: shapes, seeds, and what the user is told."""

import sys
import types

import pytest
import torch
import transformers

from dist_compress.config import ModelConfig
from dist_compress.errors import UserError
from dist_compress.models import build, describe

TINY_VIT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
CONFIGS = {
    "cifar": ModelConfig(name="resnet20"),
    "torchvision": ModelConfig(source="torchvision", name="squeezenet1_1"),
    "timm": ModelConfig(source="timm", name="resnet10t"),
    "hf": ModelConfig(source="hf", name="vit", kwargs=TINY_VIT),
    "target": ModelConfig(target={"_target_": "torchvision.models.squeezenet1_1", "num_classes": 7}),
}


@pytest.mark.parametrize("source", CONFIGS)
def test_every_source_builds_repeats_and_describes_itself(source):
    config = CONFIGS[source]
    before = torch.get_rng_state()
    model = build(config, num_classes=7, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    out = model.eval()(torch.randn(2, 3, 32, 32))
    assert getattr(out, "logits", out).shape == (2, 7)
    again = build(ModelConfig(**describe(config, model)), num_classes=7, seed=3)
    assert type(again) is type(model)
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    changed = build(config, num_classes=7, seed=4).state_dict()
    assert any(not torch.equal(a, changed[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize(("name", "params"), [("resnet20", 269_722), ("resnet56", 853_018)])
def test_the_cifar_nets_are_those_of_the_paper(name, params):
    model = build(ModelConfig(name=name), num_classes=10, seed=0)
    assert sum(p.numel() for p in model.parameters()) == params
    names = {n.rpartition(".")[0] for n, _ in model.named_parameters()}
    depth = 3 if name == "resnet20" else 9
    inner = {f"layer{s}.{i}.{m}" for s in (1, 2, 3) for i in range(depth) for m in ("conv1", "bn1", "conv2", "bn2")}
    assert names == inner | {"conv1", "bn1", "linear"}


def test_the_shortcut_subsamples_and_pads_channels_with_zeros():
    block = build(ModelConfig(name="resnet20"), num_classes=10, seed=0).layer2[0]
    x = torch.randn(1, 16, 8, 8)
    y = block.shortcut(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def tiny(num_classes, width=4):
    return torch.nn.Linear(width, num_classes)


def sized(width=4):
    return torch.nn.Linear(width, 2)


def test_a_callable_of_the_users_is_told_num_classes_when_it_asks(monkeypatch):
    package = types.ModuleType("their_package")
    package.tiny, package.sized = tiny, sized
    monkeypatch.setitem(sys.modules, "their_package", package)
    told = build(ModelConfig(target={"_target_": "their_package.tiny", "width": 3}), num_classes=7, seed=0)
    assert told.weight.shape == (7, 3)
    own = build(ModelConfig(target={"_target_": "their_package.tiny", "num_classes": 5}), num_classes=7, seed=0)
    assert own.weight.shape == (5, 4)
    silent = build(ModelConfig(target={"_target_": "their_package.sized"}), num_classes=7, seed=0)
    assert silent.weight.shape == (2, 4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ModelConfig(source="keras"), ["model.source", "keras", "torchvision", "_target_"]),
        (ModelConfig(name="resnet21"), ["model.name", "resnet20", "resnet56"]),
        (ModelConfig(kwargs={"depth": 3}), ["model.kwargs", "depth"]),
        (ModelConfig(source="torchvision", name="resnet51"), ["model.name", "resnet50"]),
        (ModelConfig(source="timm", name="resnt50"), ["model.name", "resnet50"]),
        (ModelConfig(source="hf", name="vitt"), ["model.name", "vit"]),
        (ModelConfig(source="hf", name="./nowhere"), ["model.name", "nowhere", "folder"]),
        (
            ModelConfig(source="hf", name="vit", kwargs={"hidden": 3}),
            ["model.kwargs", "hidden", "hidden_size"],
        ),
        (ModelConfig(source="hf", name="llama"), ["model.name", "llama"]),
        (ModelConfig(target={"_target_": "no_such_package.model"}), ["model._target_", "no_such_package"]),
        (ModelConfig(target={"_target_": "pathlib.PurePath"}), ["model._target_", "torch.nn.Module"]),
        (
            ModelConfig(target={"_target_": "torchvision.models.resnet18", "depth": 3}),
            ["model._target_", "depth"],
        ),
    ],
)
def test_what_cannot_be_built_names_the_key_and_the_choices(config, words):
    with pytest.raises(UserError) as error:
        build(config, num_classes=10, seed=0)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("source", "package"), [("timm", "timm"), ("hf", "transformers")])
def test_a_missing_extra_says_what_to_install(monkeypatch, source, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'dist_compress\[models\]'"):
        build(ModelConfig(source=source, name="vit"), num_classes=10, seed=0)


def test_a_hugging_face_folder_brings_its_weights_and_a_new_head_when_classes_differ(tmp_path, caplog):
    source = build(CONFIGS["hf"], num_classes=7, seed=5)
    source.save_pretrained(tmp_path / "vit")
    config = ModelConfig(source="hf", name=str(tmp_path / "vit"))
    same = build(config, num_classes=7, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), source.parameters(), strict=True))
    other = build(config, num_classes=3, seed=0)
    assert other.classifier.weight.shape == (3, 16)
    assert (
        "a new classifier, for the folder has none that fits: ['classifier.bias', 'classifier.weight']" in caplog.text
    )
    assert torch.equal(other.vit.layernorm.weight, source.vit.layernorm.weight)
    description = ModelConfig(**describe(config, other))
    assert str(tmp_path) not in str(description)
    assert build(description, num_classes=3, seed=0).classifier.weight.shape == (3, 16)


@pytest.mark.parametrize(("name", "head"), [("llama", "causal_lm"), ("bert", "sequence_classification")])
def test_models_of_text_get_the_vocabulary_of_the_data_and_are_built_again(tmp_path, name, head):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(source="hf", name=name, head=head, kwargs=sizes)
    model = build(config, num_classes=3, seed=0, vocab_size=31)
    ids = torch.arange(12).view(2, 6)
    expected = model.eval()(input_ids=ids)
    assert expected.logits.shape == ((2, 6, 31) if head == "causal_lm" else (2, 3))
    assert expected.get("past_key_values") is None
    again = build(ModelConfig(**describe(config, model)), num_classes=3, seed=0)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(input_ids=ids).logits, expected.logits)
    model.save_pretrained(tmp_path / "folder")
    own = ModelConfig(source="hf", name=str(tmp_path / "folder"), head=head)
    loaded = build(own, num_classes=3, seed=1, vocab_size=31)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, expected.logits)


TINY_TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def folder_of(path, auto, name="bert", **sizes):
    """A folder of Hugging Face's with a model of that class, and its weights."""
    config = transformers.AutoConfig.for_model(name, **{**TINY_TEXT, "vocab_size": 40, **sizes})
    model = getattr(transformers, auto).from_config(config)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM"])
def test_a_student_begins_with_a_backbone_and_a_new_classifier(tmp_path, caplog, auto):
    source = folder_of(tmp_path / "bert", auto)
    config = ModelConfig(source="hf", name=str(tmp_path / "bert"), head="sequence_classification")
    model = build(config, num_classes=3, seed=0)
    body = source.base_model.state_dict()
    for name, tensor in model.base_model.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(tensor, body[name]), name
    lines = [record.message for record in caplog.records if "a new classifier" in record.message]
    assert len(lines) == 1 and "'classifier.bias', 'classifier.weight'" in lines[0]
    assert ("bert.pooler.dense.bias" in lines[0]) == (auto == "AutoModelForMaskedLM")
    with pytest.raises(UserError, match="2 missing: classifier.bias" if auto == "AutoModel" else "4 missing: bert.po"):
        build(config, num_classes=3, seed=0, whole=True)  # a teacher


FOLDERS = {
    "no classifier of these classes": ("AutoModelForSequenceClassification", "bert", {}, {}, True, [
        "2 of another shape: classifier.bias (folder [2], model [3]), classifier.weight (folder [2, 16], ",
    ]),
    "a layer more": ("AutoModel", "bert", {}, {"num_hidden_layers": 3}, False, [
        "16 missing: bert.encoder.layer.2.attention.output.LayerNorm.bias", ", and 8 more",
    ]),
    "a layer less": ("AutoModel", "bert", {}, {"num_hidden_layers": 1}, False, ["16 unexpected: ", "encoder.layer.1."]),
    "other sizes": ("AutoModel", "bert", {}, {"hidden_size": 32}, False, ["(folder [40, 16], model [40, 32])"]),
    "tokens": ("AutoModelForCausalLM", "llama", {}, {"vocab_size": 50}, False, ["lm_head.weight (folder [40, 16]"]),
    "no output layer": ("AutoModel", "llama", {}, {}, False, ["1 missing: lm_head.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_weights_of_a_folder_that_do_not_fit_are_refused(tmp_path, case):
    auto, name, has, wanted, whole, words = FOLDERS[case]
    folder_of(tmp_path / "folder", auto, name, **has)
    head = "causal_lm" if name == "llama" else "sequence_classification"
    config = ModelConfig(source="hf", name=str(tmp_path / "folder"), head=head, kwargs=wanted)
    with pytest.raises(UserError) as error:
        build(config, num_classes=3, seed=0, whole=whole)
    for word in (f"model.name={str(tmp_path / 'folder')!r}: the weights in this folder do not fit", *words):
        assert word in str(error.value)
    assert f"with what model.head={head} needs, leave sizes out of model.kwargs" in str(error.value)


def test_a_tied_output_layer_is_not_missing(tmp_path):
    source = folder_of(tmp_path / "folder", "AutoModelForCausalLM", "llama", tie_word_embeddings=True)
    model = build(ModelConfig(source="hf", name=str(tmp_path / "folder"), head="causal_lm"), 3, 0, whole=True)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
