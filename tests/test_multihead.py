"""nn.MultiheadAttention in the open computes what torch does, and its layer and functions run as such."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from dist_compress import call_sites, multihead
from dist_compress.functions import Watched
from dist_compress.sites import Sites

GENERATOR = torch.Generator().manual_seed(0)
Q, K = torch.randn(2, 5, 8, generator=GENERATOR), torch.randn(2, 7, 8, generator=GENERATOR)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


def attention(**kwargs) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **kwargs)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    return module.eval()


CALLS = {
    "self": ((Q, Q, Q), {}),
    "cross": ((Q, K, K), {"key_padding_mask": PADDING}),
    "float_padding": ((Q, K, K), {"key_padding_mask": torch.where(PADDING, -2.0, 0.0)}),
    "causal": ((Q, Q, Q), {"attn_mask": CAUSAL, "is_causal": True}),
    "mask_by_head": ((Q, K, K), {"attn_mask": torch.rand(4, 5, 7, generator=GENERATOR) > 0.8}),
    "both": ((Q, K, K), {"attn_mask": torch.rand(5, 7, generator=GENERATOR) > 0.8, "key_padding_mask": PADDING}),
}


@pytest.mark.parametrize(("call", "weights"), list(itertools.product(CALLS, ["none", "mean", "all"])))
def test_as_torch(call, weights):
    module = attention(batch_first=True)
    args, kwargs = CALLS[call]
    kwargs = {**kwargs, "need_weights": weights != "none", "average_attn_weights": weights == "mean"}
    wanted = module(*args, **kwargs)
    Watched(module, "")
    torch.testing.assert_close(module(*args, **kwargs), wanted)


@pytest.mark.parametrize("kwargs", [{"bias": False}, {"kdim": 3, "vdim": 4}, {"batch_first": True}])
def test_other_layouts(kwargs):
    module = attention(**kwargs)
    args = (Q, torch.randn(2, 5, module.kdim), torch.randn(2, 5, module.vdim))
    wanted = module(*args)
    one = module(*(x[0] for x in args), key_padding_mask=PADDING[1, :5], average_attn_weights=False)
    Watched(module, "")
    torch.testing.assert_close(module(*args), wanted)
    found = module(*(x[0] for x in args), key_padding_mask=PADDING[1, :5], average_attn_weights=False)
    torch.testing.assert_close(found, one)
    with pytest.raises(RuntimeError, match="is_causal needs an attn_mask"):
        module(*args, is_causal=True)


def test_it_trains_as_torch_does():
    grads = []
    for opened in (False, True):
        module = attention(dropout=0.0).train()
        if opened:
            Watched(module, "")
        module(Q, Q, Q)[0].square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*grads)
    module = attention(dropout=1.0, bias=False).train()
    Watched(module, "")
    assert all(not module(Q, Q, Q, need_weights=needed)[0].any() for needed in (False, True))


def test_what_stays_closed():
    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert multihead.opens(attention())
    for module in (attention(add_bias_kv=True), attention(add_zero_attn=True), Own(8, 2), nn.Linear(8, 2)):
        assert not multihead.opens(module)


def test_the_layer_and_the_functions_inside_are_found():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sites = Sites(layer, (Q,))
    assert "self_attn.out_proj" not in sites.by_module
    found = list(call_sites.find(sites))
    assert found[:3] == ["add_0", "add_1", "self_attn.scaled_dot_product_attention_0"]
    wanted = layer.eval()(Q)
    call_sites.open_attention(sites, [{"op_names_re": [r"self_attn\..*"]}])
    assert [s.name for s in sites.by_module["self_attn.out_proj"]] == ["_input_0", "_output_0"]
    torch.testing.assert_close(layer(Q), wanted)
    call_sites.hide(layer, {"self_attn.out_proj"})
    assert call_sites.describe(layer) == [["self_attn", "MultiheadAttention", 0]]
    twin = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    call_sites.restore(twin, call_sites.describe(layer))
    assert isinstance(vars(twin.self_attn)["forward"], Watched)
    call_sites.hide(layer, {"linear1"})
    assert "forward" not in vars(layer.self_attn)
    for entry in ({"op_types": ["Linear"]}, {"op_names": ["linear1"]}, {"op_names_re": ["("]}, "out_proj"):
        call_sites.open_attention(sites, [entry])
        assert "forward" not in vars(layer.self_attn)
