"""What a run hands out is whole, loads without pickle, and gives the same bits."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import dist_compress
from dist_compress import export, models, speedup
from dist_compress.config import Config, ModelConfig
from dist_compress.errors import UserError
from dist_compress.export import safetensors
from dist_compress.speedup import Plan, apply

EXAMPLE = ((torch.randn(2, 3, 32, 32),), {})


def trained(config=ModelConfig(), num_classes=10):  # noqa: B008
    """A model whose every tensor differs from what any seed gives."""
    model = models.build(config, num_classes, seed=1)
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += (torch.rand(tensor.shape, generator=generator) - 0.5) * 0.1
    return model


@pytest.fixture(scope="module")
def shrunk():
    """(dense masked model, the same one shrunk, its plan)"""
    model = trained()
    for block in (model.layer1[0], model.layer2[1]):
        with torch.no_grad():
            for tensor in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
                tensor[::2] = 0
    plan = speedup.plan(model, *EXAMPLE)
    return model, apply(copy.deepcopy(model), plan), plan


def test_a_pruned_model_comes_back_bit_for_bit(tmp_path, shrunk):
    masked, small, plan = shrunk
    small.train()
    safetensors.export(tmp_path, small, plan, Config(), EXAMPLE)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "model.json", "model.safetensors", "plan.json", "plan.safetensors",
    ]  # fmt: skip
    assert safetensors.check(tmp_path, small, EXAMPLE) == {"max_rel_diff": 0.0}
    assert small.training
    loaded = dist_compress.load(tmp_path)
    assert not loaded.training and loaded.layer1[0].conv1.weight.shape == (8, 16, 3, 3)
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), small.eval()(x))
        assert torch.allclose(loaded(x), masked.eval()(x), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "model.safetensors").stat().st_size < sum(p.numel() for p in masked.parameters()) * 4


def test_load_works_in_a_fresh_process_with_pickle_switched_off(tmp_path, shrunk):
    _, small, plan = shrunk
    safetensors.export(tmp_path, small, plan, Config(), EXAMPLE)
    code = (
        "import sys, torch, pickle, dist_compress\n"
        "def refuse(*a, **k): raise AssertionError('pickle')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse\n"
        "x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)\n"
        "print(dist_compress.load(sys.argv[1])(x).double().sum().item().hex())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    assert float.fromhex(out.stdout.strip()) == small.eval()(x).double().sum().item()


VIT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(source="timm", name="resnet10t"),
        ModelConfig(source="hf", name="vit", kwargs=VIT),
        ModelConfig(target={"_target_": "torchvision.models.squeezenet1_1", "num_classes": 7}),
        ModelConfig(num_classes=7),
    ],
    ids=["timm", "hf", "target", "num_classes"],
)
def test_every_source_comes_back(tmp_path, config):
    model = trained(config, num_classes=3 if config.num_classes else 7)
    safetensors.export(tmp_path, model, None, Config(model=config), EXAMPLE)
    assert json.loads((tmp_path / "model.json").read_text())["num_classes"] == 7
    assert safetensors.check(tmp_path, model, EXAMPLE) == {"max_rel_diff": 0.0}


def test_the_memory_layout_comes_back(tmp_path):
    model = trained().to(memory_format=torch.channels_last)
    safetensors.export(tmp_path, model, None, Config(), EXAMPLE)
    assert dist_compress.load(tmp_path).conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert safetensors.check(tmp_path, model, EXAMPLE) == {"max_rel_diff": 0.0}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_ties_are_saved_once_and_come_back_tied(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "their_models", sys.modules[__name__])
    config, example = ModelConfig(target={"_target_": "their_models.Tied"}), ((torch.randn(2, 4),), {})
    model = Tied()
    safetensors.export(tmp_path, model, None, Config(model=config), example)
    assert safetensors.check(tmp_path, model, example) == {"max_rel_diff": 0.0}
    loaded = dist_compress.load(tmp_path, trust=True)
    assert loaded.a.weight is loaded.b.weight


class TiedTagger(nn.Module):
    """Word embedding and classifier are one matrix; the attention counts its heads in its own code."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.classify = nn.Linear(8, 11, bias=False)
        self.classify.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words)
        q, k, v = self.qkv(x).view(x.size(0), -1, 3, 4, 2).permute(2, 0, 3, 1, 4)
        x = (q @ k.mT).softmax(-1) @ v
        return self.classify(self.proj(x.transpose(1, 2).flatten(2)))


def test_a_pruned_model_of_ties_and_rewritten_graphs_comes_back(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "their_models", sys.modules[__name__])
    config, words = ModelConfig(target={"_target_": "their_models.TiedTagger"}), torch.randint(0, 11, (2, 5))
    model = TiedTagger().eval()
    with torch.no_grad():
        for tensor in (model.qkv.weight, model.qkv.bias):
            tensor.view(3, 4, 2, -1)[:, 1] = 0  # a head
        model.embed.weight[:, 3] = 0
        model.proj.weight[3], model.proj.bias[3] = 0, 0
    wanted, plan = model(words), speedup.plan(model, (words,))
    small = apply(copy.deepcopy(model), plan)
    assert set(plan.graphs) == {""} and small.qkv.weight.shape == (18, 7)
    safetensors.export(tmp_path, small, plan, Config(model=config), ((words,), {}))
    assert safetensors.check(tmp_path, small, ((words,), {})) == {"max_rel_diff": 0.0}
    loaded = dist_compress.load(tmp_path, trust=True)
    assert loaded.classify.weight is loaded.embed.weight and loaded.embed.weight.shape == (11, 7)
    assert speedup.verify(wanted, loaded(words)) < 1e-6


LLAMA = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_plan_of_a_tied_language_model_is_replayed(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model, words = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval(), torch.randint(0, 32, (2, 5))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[::3] = 0
            layer.self_attn.v_proj.weight[:4] = 0  # one key head, and the two query heads that read it
    wanted, plan = model(words).logits, speedup.plan(model, (), {"input_ids": words})
    small = apply(copy.deepcopy(model), plan)
    assert small.model.layers[0].self_attn.q_proj.weight.shape == (8, 16)
    plan.save(tmp_path)
    safetensors.save_file(safetensors._state(small), tmp_path / "model.safetensors")
    again = apply(LlamaForCausalLM(LlamaConfig(**LLAMA)), Plan.load(tmp_path)).eval()
    models.load_weights(again, tmp_path / "model.safetensors")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert speedup.verify(wanted, again(words).logits) < 1e-5
    assert again.generate(words, max_new_tokens=3, do_sample=False).tolist() == (
        small.generate(words, max_new_tokens=3, do_sample=False).tolist()
    )


def test_what_a_folder_names_is_called_only_when_trusted(tmp_path):
    """`torch.load` of a pickle, say, is not on any list of what Hydra refuses to call."""
    config = ModelConfig(target={"_target_": "torchvision.models.squeezenet1_1", "num_classes": 7})
    safetensors.export(tmp_path, trained(config), None, Config(model=config), EXAMPLE)
    file, ran = tmp_path / "model.json", tmp_path / "ran"
    description = json.loads(file.read_text())
    description["model"]["target"] = {"_target_": "torch.save", "obj": 1, "f": str(ran)}
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"'torch\.save'.*trust=True"):
        dist_compress.load(tmp_path)
    assert not ran.exists()


def test_check_refuses_other_weights(tmp_path):
    model = trained()
    safetensors.export(tmp_path, model, None, Config(), EXAMPLE)
    with torch.no_grad():
        model.linear.bias[3] += 0.01
    with pytest.raises(RuntimeError, match="differs"):
        safetensors.check(tmp_path, model, EXAMPLE)
    with torch.no_grad():
        model.linear.bias[3] = float("nan")
    with pytest.raises(RuntimeError, match="nan"):
        safetensors.check(tmp_path, model, EXAMPLE)


def test_a_failing_export_leaves_the_old_files_and_no_litter(tmp_path, monkeypatch):
    model = trained()
    safetensors.export(tmp_path, model, None, Config(), EXAMPLE)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    monkeypatch.setattr(Plan, "save", lambda self, folder: (folder / "plan.json").write_text("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        safetensors.export(tmp_path, trained(), Plan(), Config(), EXAMPLE)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: [x.unlink() for x in f.iterdir()], ["model.json"]),
        (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "no such file"]),
        (lambda f: (f / "plan.json").unlink(), ["plan.json"]),
        (lambda f: (f / "model.json").write_text("{"), ["model.json", "damaged"]),
        (lambda f: (f / "model.json").write_text('{"format": 1}'), ["model.json", "damaged"]),
        (lambda f: edit(f, format=9), ["model.json", "format 9"]),
        (lambda f: edit(f, num_classes=3), ["linear.weight", "[10, 64]", "[3, 64]"]),
        (lambda f: edit(f, model={"name": "resnet56"}), ["layer1.3.bn1.weight"]),
        (lambda f: truncate(f / "model.safetensors"), ["model.safetensors", "truncated"]),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_why(tmp_path, shrunk, spoil, words):
    _, small, plan = shrunk
    safetensors.export(tmp_path, small, plan, Config(), EXAMPLE)
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        dist_compress.load(tmp_path)
    for word in (str(tmp_path), *words):
        assert word in str(error.value)


def edit(folder, **changes):
    file = folder / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file):
    file.write_bytes(file.read_bytes()[:1000])


def test_no_folder_and_no_format_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        dist_compress.load(tmp_path / "nowhere")
    assert export.find("safetensors") is safetensors
    with pytest.raises(UserError, match=r"export=\[onyx\].*safetensors"):
        export.find("onyx")
