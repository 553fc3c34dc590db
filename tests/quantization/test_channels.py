"""Folds are found in the graph: what feeds what, where a channel must stay, and that the rescaled model is the same."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from block_nets import SIZE, Block, attached, micro, shown  # noqa: E402

from dist_compress.quantization import channels  # noqa: E402
from dist_compress.sites import Sites  # noqa: E402

X = torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(3))


def folds(model, *args, **kwargs):
    """{producer: {reader: number of channels}}"""
    graph = channels.find(Sites(model.eval(), args, kwargs))
    return {f.parameters[0][0]: {r.layer: int((r.channels >= 0).sum()) for r in f.readers} for f in graph.folds}, graph


def test_a_block_of_a_transformer():
    found, graph = folds(Block(), X)
    assert found == {
        "norm1.weight": {"q": 16, "k": 16, "v": 16},
        "v.weight": {"o": 16},
        "norm2.weight": {"gate": 16, "up": 16},
        "up.weight": {"down": 24},
    }
    assert graph.sources == {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
    assert [f.parameters for f in graph.folds][1] == (("v.weight", 0), ("v.bias", 0))


class Pieces(nn.Module):
    """norm, then a linear layer `first`, a function, and a linear layer `last`."""

    def __init__(self, middle, tail=lambda self, x, y: y):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.middle, self.tail = middle, tail

    def forward(self, x):
        y = self.norm(x)
        z = self.first(y)
        return self.tail(self, y, self.last(self.middle(self, z)))


def same(self, x, y):
    return y


@pytest.mark.parametrize(
    ("middle", "tail", "kept"),
    [
        (lambda self, z: z.relu(), same, {"norm.weight": {"first": 16}, "first.weight": {"last": 16}}),
        (lambda self, z: -nn.functional.leaky_relu(z) / 3, same,
         {"norm.weight": {"first": 16}, "first.weight": {"last": 16}}),
        (lambda self, z: nn.functional.gelu(z), same, {"norm.weight": {"first": 16}}),
        (lambda self, z: z * z, same, {"norm.weight": {"first": 16}}),
        (lambda self, z: z + 1, same, {"norm.weight": {"first": 16}}),
        (lambda self, z: 1 / z, same, {"norm.weight": {"first": 16}}),
        (lambda self, z: z.flip(-1), same, {"norm.weight": {"first": 16}}),  # an op that is not known
        # a residual of what the norm puts out: its channels are seen
        (lambda self, z: z, lambda self, y, out: y + out, {"first.weight": {"last": 16}}),
        # half of the channels go through GELU
        (lambda self, z: torch.cat([nn.functional.gelu(z[..., :8]), z[..., 8:]], -1), same,
         {"norm.weight": {"first": 16}, "first.weight": {"last": 8}}),
        # the weight is read a second time, or the layer is called twice
        (lambda self, z: z + self.last.weight.sum(), same, {"norm.weight": {"first": 16}}),
        (lambda self, z: z, lambda self, y, out: self.last(out), {"norm.weight": {"first": 16}}),
        (lambda self, z: z, lambda self, y, out: out + self.norm.weight, {"first.weight": {"last": 16}}),
        # what is returned
        (lambda self, z: z, lambda self, y, out: (out, y), {"first.weight": {"last": 16}}),
    ],
)  # fmt: skip
def test_a_channel_that_something_else_looks_at_stays(middle, tail, kept):
    found, _ = folds(Pieces(middle, tail), X)
    assert found == kept


def test_channels_follow_the_elements():
    def middle(self, z):  # the second half before the first
        return torch.cat([z[..., 8:], z[..., :8]], -1)

    _, graph = folds(Pieces(middle), X)
    assert graph.folds[1].readers[0].channels.tolist() == [*range(8, 16), *range(8)]


def test_tied_weights_stay():
    model = Pieces(lambda self, z: z)
    model.other = nn.Embedding(SIZE, SIZE)
    model.other.weight = model.last.weight
    assert folds(model, X)[0] == {"norm.weight": {"first": 16}}


TINY = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def llama():
    config = transformers.LlamaConfig(**TINY, **SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def phi3():
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**TINY, **SIZES, num_key_value_heads=2))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, **SIZES))


def vit():
    config = transformers.ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 8})
    return transformers.ViTForImageClassification(config)


def example(model):
    if hasattr(model, "vit"):
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    return {"input_ids": torch.randint(1, 50, (2, 7))}


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (llama, {"input_layernorm": 3, "v_proj": 1, "post_attention_layernorm": 2, "up_proj": 1, "model.norm": 1}),
        (phi3, {"input_layernorm": 1, "qkv_proj": 1, "post_attention_layernorm": 1, "gate_up_proj": 1,
                "model.norm": 1}),
        (gpt2, {"ln_1": 1, "c_attn": 1, "ln_2": 1}),
        (bert, {"value": 1, "output.LayerNorm": 1}),  # of the last layer alone: the others feed a residual
        (vit, {"layernorm_before": 3, "v_proj": 1, "layernorm_after": 1, "vit.layernorm": 1}),
    ],
)  # fmt: skip
def test_models_of_transformers_are_the_same_after_rescaling(build, wanted):
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)  # norms and biases that matter
    found, graph = folds(model, **example(model))
    touched = {name for fold in graph.folds for name, _ in fold.parameters}
    touched |= {f"{reader.layer}.weight" for fold in graph.folds for reader in fold.readers}
    assert {next(w for w in wanted if w in name): len(readers) for name, readers in found.items()} == wanted
    inputs = example(model)
    kind = "Conv1D" if build is gpt2 else "Linear"
    for method in ("awq", "smoothquant"):
        copied = copy.deepcopy(model)
        entry = {"op_types": [kind], "target_names": ["weight"], "quant_dtype": "int4"}
        options = {"num_steps": 4, "weight_observer": "min_max"} if method == "awq" else {}
        quantizer = attached(copied, ((), inputs), 2, method=method, config_list=[entry], options=options)
        shown(quantizer, lambda step, j: inputs, 1)
        changed = {n for n, p in copied.named_parameters() if not torch.equal(p, model.get_parameter(n))}
        assert changed == touched if method == "smoothquant" else changed and changed <= touched
        with torch.no_grad():
            wanted_out, out = model(**inputs).logits, copied(**inputs).logits
        assert float((out - wanted_out).abs().max() / wanted_out.abs().max()) < 1e-6


def test_heads_that_share_values_share_their_numbers():
    torch.manual_seed(0)
    model = llama()
    graph = channels.find(Sites(model.eval(), (), {"input_ids": torch.randint(1, 50, (2, 7))}))
    fold = next(f for f in graph.folds if "layers.0.self_attn.v_proj" in f.parameters[0][0])
    head = [*range(8)], [*range(8, 16)]
    assert fold.readers[0].channels.tolist() == [*head[0], *head[0], *head[1], *head[1]]


def test_micro_batches_of_another_length_are_heard_too():
    shown(attached(Block(), method="awq"), lambda step, j: micro(step, j)[:, : 2 + j])
