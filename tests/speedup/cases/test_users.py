"""Models as people have them: from Hugging Face with masks and caches, branches by data, marks of their own."""

import copy

import pytest
import torch
import transformers
from small_nets import Net, both
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import ModelOutput

from dist_compress import speedup
from dist_compress.speedup import apply, verify
from dist_compress.tracing import concrete_trace

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def llama(attention):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config).eval()


def padded(batch, length):
    """Keyword arguments only, the first row padded on the left: the mask is built inside of vmap."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :2] = 0
    return {"input_ids": torch.randint(1, 40, (batch, length)), "attention_mask": mask, "use_cache": True}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_language_model_with_padding_and_a_cache(attention, dtype, tolerance):
    model = llama(attention).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:6] = 0
            layer.self_attn.q_proj.weight[8:] = 0  # the second key head and the two heads that it serves
            layer.self_attn.k_proj.weight[4:] = 0
            layer.self_attn.v_proj.weight[4:] = 0
    plan = speedup.plan(model, kwargs=padded(2, 6))
    small = apply(copy.deepcopy(model), plan)
    attention, mlp = small.model.layers[1].self_attn, small.model.layers[1].mlp
    assert attention.q_proj.weight.shape == (8, 16) and attention.k_proj.weight.shape == (4, 16)
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (18, 16)
    inputs = padded(3, 9)
    with torch.no_grad():
        expected, actual = model(**inputs), small(**inputs)
    assert isinstance(actual, ModelOutput)
    assert verify(expected.logits, actual.logits) <= tolerance
    for name in ("keys", "values"):  # of the head that is left
        whole, left = (getattr(out.past_key_values.layers[0], name) for out in (expected, actual))
        assert whole.shape[1] == 2 and left.shape[1] == 1 and verify(whole[:, :1], left) <= tolerance
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **settings), small.generate(**prompt, **settings))


class Branches(nn.Module):
    """One way for positive inputs, another for negative ones, and a number of steps that is read off a tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.register_buffer("steps", torch.tensor(2))

    def forward(self, x):
        y = self.a(x)
        for _ in range(int(self.steps)):
            y = F.relu(y) * 0.5
        if x.mean() > 0:
            return self.b(y)
        return self.c(y)


def positive(batch):
    return torch.rand(batch, 4) + 0.1


def test_a_branch_by_data_is_captured_and_listed():
    model = Branches().eval()
    graph = concrete_trace(model, (positive(2),))
    new = positive(5)
    assert verify(model(new), graph(new)) < 1e-6
    assert [(item.function, item.value) for item in graph.meta["specialised"]] == [("__int__", 2), ("__bool__", True)]


def test_a_branch_by_data_is_exact_where_it_was_looked_at(shrink):
    small, _ = shrink(Branches(), positive, both("a", [1, 5]))
    assert small.a.out_features == small.b.in_features == 6


def test_the_other_branch_fails_loudly_or_is_right():
    model = Branches().eval()
    with torch.no_grad():
        for name, index in both("a", [1, 5]).items():
            model.get_parameter(name)[index] = 0
    small = apply(copy.deepcopy(model), speedup.plan(model, (positive(2),)))
    new = -positive(3)
    try:
        actual = small(new)
    except RuntimeError as error:
        assert "shapes cannot be multiplied" in str(error)
    else:
        assert verify(model(new), actual) < 1e-6


def marked():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()
    )
    with torch.no_grad():
        nn.init.uniform_(model[1].running_mean)
        for name, index in {"0.weight": [1, 6], **both("1", [1, 6])}.items():
            model.get_parameter(name)[index] = 0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_what_modules_carry_is_preserved(dtype):
    model = marked().to(dtype=dtype, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append("hook"))
    statistics = model[1].running_mean.clone()
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    plan = speedup.plan(model, (x,))
    small = apply(copy.deepcopy(model), plan)
    calls.clear()
    left = [0, 2, 3, 4, 5, 7]
    assert torch.equal(small[1].running_mean, statistics[left]) and small[1].num_features == 6
    assert [m.training for m in small] == [True, False, True, True, True]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert {p.dtype for p in small.parameters()} == {dtype} and {p.device.type for p in small.parameters()} == {"cpu"}
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        new = torch.randn(3, 3, 6, 6, dtype=dtype)
        assert verify(model.eval()(new), small.eval()(new)) <= 16 * torch.finfo(dtype).eps
    assert calls == ["hook", "hook"]


def test_a_shrunk_model_trains():
    small = apply(model := marked(), speedup.plan(model, (torch.randn(2, 3, 6, 6),)))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.randn(4, 3, 6, 6)).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    optimizer.step()


def test_layers_of_a_net_by_functions(shrink):
    """No module knows of the parameter."""
    model = Net(
        lambda m, x: F.linear(F.relu(F.linear(x, m.first)), m.last),
        first=nn.Parameter(torch.randn(8, 4)), last=nn.Parameter(torch.randn(3, 8)),
    )  # fmt: skip
    small, _ = shrink(model, torch.randn(1, 4), {"first": [0, 7]})
    assert small.first.shape == (6, 4) and small.last.shape == (3, 6)
