"""Norms over a pruned dim: recognised by what they compute, exact over the old width, or narrowed by name."""

import copy

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dist_compress import speedup
from dist_compress.speedup import Plan, apply, verify
from dist_compress.speedup.modules.norm import normalise
from dist_compress.speedup.norms import formula_of

NORMS = {
    "layer": (nn.LayerNorm(12, 1e-3), -1, True, False),
    "layer_without_bias": (nn.LayerNorm(12, bias=False), -1, True, False),
    "layer_without_affine": (nn.LayerNorm(12, elementwise_affine=False), -1, True, False),
    "rms": (nn.RMSNorm(12, 1e-6), -1, False, False),
    "rms_without_eps": (nn.RMSNorm(12), -1, False, False),
    "torchvision_2d": (torchvision.models.convnext.LayerNorm2d(12), 1, True, False),
    "timm": (timm.layers.LayerNorm(12), -1, True, False),
    "timm_2d": (timm.layers.LayerNorm2d(12), 1, True, False),
    "timm_rms": (timm.layers.RmsNorm(12), -1, False, False),
    "llama": (LlamaRMSNorm(12), -1, False, False),
    "t5": (T5LayerNorm(12), -1, False, False),
    "gemma": (GemmaRMSNorm(12), -1, False, True),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_recognised_and_exact(name):
    module, axis, centred, one_plus = NORMS[name]
    module = copy.deepcopy(module)
    formula = formula_of(module)
    assert formula is not None
    assert (formula.width, formula.axis, formula.centred, formula.one_plus) == (12, axis, centred, one_plus)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, 12, 3, 4, generator=generator) if axis == 1 else torch.randn(2, 3, 12, generator=generator)
    x.index_fill_(axis, torch.tensor([1, 5]), 0.0)
    kept = torch.tensor([i for i in range(12) if i not in (1, 5)])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-6 if formula.single else 1e-12)):
        formula = formula_of(module.to(dtype))
        affine = tuple(p.detach()[kept] for p in module.parameters())
        settings = {field: getattr(formula, field) for field in formula.__dataclass_fields__}
        expected = module(x.to(dtype)).index_select(axis, kept)
        actual = normalise(x.to(dtype).index_select(axis, kept), affine, **settings)
        assert actual.dtype == expected.dtype and verify(expected, actual) < tolerance


def test_what_is_no_norm_over_one_dim_is_not_recognised():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(12)), 1e-6

        def forward(self, x):
            return x * self.weight

    hooked = nn.LayerNorm(12)
    hooked.register_forward_hook(lambda *_: None)
    others = [nn.BatchNorm2d(12), nn.GroupNorm(1, 12), nn.LayerNorm((3, 12)), nn.Linear(12, 12), nn.PReLU(12), Scale()]
    assert [formula_of(module) for module in (*others, hooked)] == [None] * 7


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def gpt2():
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, **ids)
    )


def tokens(batch):
    return torch.randint(0, 50, (batch, 7))


def images(size):
    return lambda batch: torch.randn(batch, 3, size, size)


# name -> (builder, input, most parameters left)
MODELS = {
    "llama": (llama, tokens, 0.55),
    "bert": (bert, tokens, 0.6),
    "gpt2": (gpt2, tokens, 0.6),
    "vit": (lambda: torchvision.models.VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=5), images(16), 0.65),
    "swin": (lambda: SwinTransformer([2, 2], 16, [1, 2], [2, 4], [2, 2], num_classes=5), images(32), 0.6),
    "convnext": (
        lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=5), images(32), 0.6,
    ),
}  # fmt: skip


def prepared(build, dtype):
    """Random affines, layer scales and heads; float64 for all that follows it."""
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1 or float(parameter.detach().abs().max()) < 1e-4:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_hidden_width_is_a_group(name, dtype, tmp_path):
    build, make_input, most = MODELS[name]
    model = prepared(build, dtype)
    x = make_input(2)
    x = x.to(dtype) if x.is_floating_point() else x
    capture = speedup.capture(model, (x,), norm="exact")
    coupled = speedup.coupling(capture)
    generator = torch.Generator().manual_seed(3)
    for group in coupled.groups:
        if not group.blocked and group.num_units > 1:
            units = torch.randperm(group.num_units, generator=generator)[: max(1, int(group.num_units * 0.3))]
            speedup.mask_units(model, group, units)
    plan = speedup.plan(capture)
    plan.save(tmp_path)
    loaded = Plan.load(tmp_path)
    small = apply(copy.deepcopy(model), loaded)
    assert sum(swap.name == "exact_norm" for swap in loaded.swaps.values()) >= 3
    assert sum(p.numel() for p in small.parameters()) < most * sum(p.numel() for p in model.parameters())
    new = make_input(3).to(x.dtype)
    single = dtype == torch.float32 or name == "llama"  # its norms compute in float32, always
    with torch.no_grad():
        assert verify(model(new), small(new)) < (1e-6 if single else 1e-10)


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 12), norm, nn.Linear(12, 4)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def masked(norm, bias=True):
    model = Block(norm)
    with torch.no_grad():
        model.a.weight[[2, 3]] = 0
        if bias:
            model.a.bias[[2, 3]] = 0
        for parameter in model.norm.parameters():
            parameter[[2, 3]] = 0
    return model


X = torch.randn(5, 6)


def test_kept_by_default_and_constants_are_no_zeros():
    assert not speedup.plan(masked(nn.LayerNorm(12)), (X,)).keep
    constant = masked(nn.LayerNorm(12), bias=False)
    plan = speedup.plan(constant, (X,), norm="exact")
    assert not plan.keep and "not zero" in plan.blocked[0].reason


def test_the_exchanged_norm_keeps_its_kind_and_trains():
    model = masked(nn.LayerNorm(12))
    hooked = []
    small = apply(copy.deepcopy(model), speedup.plan(model, (X,), norm="exact"))
    small.norm.register_forward_hook(lambda *_: hooked.append(1))
    assert isinstance(small.norm, nn.LayerNorm) and small.norm.normalized_shape == (10,) and small.training
    assert set(small.state_dict()) == set(model.state_dict()) and small.norm.weight.shape == (10,)
    small(X).sum().backward()
    assert hooked and small.norm.weight.grad.shape == (10,) and "10 of 12" in repr(small)


def test_without_a_mean_zeros_stay_zeros_whatever_the_factor():
    model = masked(nn.RMSNorm(12))
    nn.init.ones_(model.norm.weight)
    small = apply(copy.deepcopy(model), speedup.plan(model, (X,), norm="exact"))
    assert small.b.in_features == 10 and verify(model(X), small(X)) < 1e-6
    layer = masked(nn.LayerNorm(12))
    nn.init.ones_(layer.norm.weight)
    assert not speedup.plan(layer, (X,), norm="exact").keep


def test_plain_norms_change_the_function():
    model = masked(nn.LayerNorm(12))
    plan = speedup.plan(model, (X,), norm="plain")
    small = apply(copy.deepcopy(model), plan)
    assert type(small.norm) is nn.LayerNorm and small.norm.normalized_shape == (10,) and small.b.in_features == 10
    assert verify(model(X), small(X)) > 1e-3
