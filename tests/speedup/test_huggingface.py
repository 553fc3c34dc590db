"""Models built from a config: its fields follow a uniform shrink, and what is saved loads again."""

import copy

import pytest
import torch
import transformers

from dist_compress import speedup
from dist_compress.speedup import Plan, apply, verify

TINY = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def llama(**settings):
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **sizes | settings))


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, **sizes))


def bert():
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, **sizes))


def t5():
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**TINY, **sizes))


def t5_encoder():
    return transformers.T5EncoderModel(t5().config)


def shrunk(build, wanted, uniform=True, **settings):
    """(masked model, small model, plan): a third of the units of each wanted group, or fewer of the first."""
    torch.manual_seed(0)
    model = build().eval()
    inputs = {"input_ids": torch.randint(1, 50, (2, 7))}
    if isinstance(model, transformers.T5ForConditionalGeneration):
        inputs["decoder_input_ids"] = torch.randint(1, 50, (2, 5))
    capture = speedup.capture(model, (), inputs, **settings)
    for i, group in enumerate(g for g in speedup.coupling(capture).groups if not g.blocked and wanted(g)):
        count = group.num_units // (3 if uniform or i else 6)
        speedup.mask_units(model, group, torch.arange(max(1, count)))
    plan = speedup.plan(capture)
    return model, apply(copy.deepcopy(model), plan), plan


def heads(group):
    return group.num_units in (2, 4)


def hidden(group):
    return any(part in group.name for part in ("gate_proj", "c_fc", "intermediate", "wi"))


EXPECTED = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
    "t5_encoder": {"num_heads": 3, "d_ff": 32},
}


@pytest.mark.parametrize("name", ["llama", "t5_encoder"])
def test_heads_and_hidden_units_go_into_the_config(name, tmp_path):
    model, small, plan = shrunk({"llama": llama, "t5_encoder": t5_encoder}[name], lambda g: heads(g) or hidden(g))
    assert plan.config == EXPECTED[name]
    assert all(getattr(small.config, field) == value for field, value in plan.config.items())
    (tmp_path / "plan").mkdir()
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").config == plan.config
    small.save_pretrained(tmp_path / "model")
    again = type(small).from_pretrained(tmp_path / "model", local_files_only=True).eval()
    inputs = {"input_ids": torch.randint(1, 50, (3, 9))}
    with torch.no_grad():
        assert verify(model(**inputs)[0], again(**inputs)[0]) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate_still_works(name, implementation):
    build = {"llama": llama, "gpt2": gpt2, "t5": t5}[name]
    if name == "t5" and implementation == "sdpa":
        pytest.skip("T5 has no sdpa attention")

    def with_attention():
        model = build()
        model.set_attn_implementation(implementation)
        return model

    model, small, plan = shrunk(with_attention, lambda g: heads(g) or hidden(g))
    assert plan.keep
    prompt = torch.randint(1, 50, (2, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **settings)
    actual = small.generate(prompt, output_logits=True, return_dict_in_generate=True, **settings)
    assert torch.equal(expected.sequences, actual.sequences)
    assert verify(torch.stack(expected.logits), torch.stack(actual.logits)) < 1e-5


def test_bert_saves_its_hidden_units_but_not_its_heads():
    _, small, plan = shrunk(bert, hidden)
    assert plan.config == {"intermediate_size": 32} and small.config.intermediate_size == 32
    model, small, plan = shrunk(bert, heads)
    assert plan.keep and not plan.config and small.config.num_attention_heads == 4  # its size would be 32 / 3


def test_what_differs_between_layers_or_is_exchanged_stays_out_of_the_config():
    _, small, plan = shrunk(llama, hidden, uniform=False)
    assert plan.keep and "intermediate_size" not in plan.config and small.config.intermediate_size == 48
    _, small, plan = shrunk(llama, lambda g: g.num_units == 32, norm="exact")
    assert plan.swaps and not plan.config and small.config.hidden_size == 32
    wide = {"hidden_size": 36, "head_dim": 8}  # a third less is still so many times the number of heads
    _, small, plan = shrunk(lambda: llama(**wide), lambda g: g.num_units == 36, norm="plain")
    assert plan.config == {"hidden_size": 24} and small.config.hidden_size == 24


def test_sizes_follow_what_they_were_used_for():
    """GPT2 splits by an attribute; T5 has other integers of the size that shrinks, which must stay."""
    _, small, plan = shrunk(gpt2, heads)
    attention = small.transformer.h[0].attn
    assert attention.split_size == 24 and attention.num_heads == 3 and attention.c_attn.nf == 72
    assert attention.head_dim == 8 and not plan.graphs
    _, small, plan = shrunk(t5_encoder, heads)
    attention = small.encoder.block[0].layer[0].SelfAttention
    assert (attention.n_heads, attention.inner_dim, attention.d_model) == (3, 24, 32)
    assert attention.relative_attention_num_buckets == 32 and not plan.graphs
    _, small, _ = shrunk(bert, heads)
    attention = small.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.attention_head_size) == (3, 8)
    assert attention.all_head_size == 24
