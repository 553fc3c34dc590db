"""nn.MultiheadAttention: whole heads go, whatever torch's fused kernels assume."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from dist_compress import speedup
from dist_compress.speedup import Plan, apply, verify

WIDTH, HEADS = 12, 3


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def fastpath(request):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield request.param
    torch.backends.mha.set_fastpath_enabled(before)


def mask_head(attention, head, part="v", coordinates=slice(None)):
    """Zero the rows of one part of a head, or ("out") the columns that read it."""
    rows = torch.arange(WIDTH).view(HEADS, -1)[head][coordinates]
    with torch.no_grad():
        if part == "out":
            attention.out_proj.weight[:, rows] = 0
            return
        offset = {"q": 0, "k": WIDTH, "v": 2 * WIDTH}[part]
        weight = attention.in_proj_weight if attention.in_proj_weight is not None else attention.v_proj_weight
        weight[rows + (offset if attention.in_proj_weight is not None else 0)] = 0
        if attention.in_proj_bias is not None:
            attention.in_proj_bias[rows + offset] = 0
        if attention.bias_v is not None:
            attention.bias_v[..., rows] = 0


class Attends(nn.Module):
    def __init__(self, call, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        self.call = call
        if self.core.in_proj_bias is not None:
            nn.init.uniform_(self.core.in_proj_bias, -1, 1)

    def forward(self, x):
        return self.call(self.core, x)


def plain(core, x):
    return core(x, x, x)[0]


def masked_keys(core, x):
    batch, tokens = x.shape[:2] if core.batch_first else x.shape[1::-1]
    padding = torch.arange(tokens)[None] >= tokens - torch.arange(batch)[:, None]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return core(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]


def crossed(core, x):
    return core(x, x[..., :7], x[..., :5], need_weights=False)[0]


def alone(core, x):
    return core(x[0], x[0], x[0], need_weights=False)[0]


CASES = {
    "self": (plain, {}),
    "batch_first": (plain, {"batch_first": True}),
    "without_bias": (plain, {"bias": False, "batch_first": True}),
    "masks": (masked_keys, {"batch_first": True}),
    "masks_tokens_first": (masked_keys, {}),
    "cross": (crossed, {"kdim": 7, "vdim": 5, "batch_first": True}),
    "bias_kv": (plain, {"add_bias_kv": True}),
    "unbatched": (alone, {"batch_first": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_head_is_removed(case, dtype, fastpath):
    call, settings = CASES[case]
    model = Attends(call, **settings).eval().to(dtype)
    mask_head(model.core, 1)
    x = torch.randn(2, 4, WIDTH, dtype=dtype)
    plan = speedup.plan(model, (x,))
    small = apply(copy.deepcopy(model), plan)
    core = small.core
    assert core.num_heads == HEADS - 1 and core.head_dim == 4 and core.embed_dim == WIDTH
    assert core.out_proj.weight.shape == (WIDTH, 8) and core.out_proj.in_features == 8
    if core.in_proj_weight is not None:
        assert core.in_proj_weight.shape == (24, WIDTH)
    else:
        assert core.k_proj_weight.shape == (8, 7) and core.v_proj_weight.shape == (8, 5)
    assert isinstance(core, nn.MultiheadAttention) and set(small.state_dict()) == set(model.state_dict())
    for shape in (x.shape, (3, 6, WIDTH)):
        new = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            assert verify(model(new), small(new)) < (1e-5 if dtype == torch.float32 else 1e-10)
    torch.manual_seed(0)
    small.train()(x).sum().backward()
    assert core.out_proj.weight.grad.shape == (WIDTH, 8)


def test_its_output_columns_free_a_head_and_a_part_of_it_does_not():
    x = torch.randn(2, 4, WIDTH)
    model = Attends(plain).eval()
    mask_head(model.core, 2, "out")
    assert speedup.plan(model, (x,)).swaps["core"].settings["num_heads"] == 2
    model = Attends(plain).eval()
    mask_head(model.core, 2, "v", slice(1))
    assert not speedup.plan(model, (x,)).keep


def test_coordinates_of_all_heads_go():
    model = Attends(plain).eval()
    for head in range(HEADS):
        for part in ("q", "k"):
            mask_head(model.core, head, part, slice(1))
    plan = speedup.plan(model, (torch.randn(2, 4, WIDTH),))
    assert not plan.keep  # fused rows of q, k and v go together
    for head in range(HEADS):
        mask_head(model.core, head, "v", slice(1))
    x = torch.randn(2, 4, WIDTH)
    plan = speedup.plan(model, (x,))
    small = apply(copy.deepcopy(model), plan)
    assert small.core.num_heads == HEADS and small.core.in_proj_weight.shape == (27, WIDTH)
    assert verify(model(x), small(x)) < 1e-6


def test_weights_that_are_read_keep_their_heads():
    model = Attends(lambda core, x: core(x, x, x)).eval()
    mask_head(model.core, 1)
    assert not speedup.plan(model, (torch.randn(2, 4, WIDTH),)).keep
    model.call = lambda core, x: core(x, x, x, average_attn_weights=False)
    assert not speedup.plan(model, (torch.randn(2, 4, WIDTH),)).keep


def test_a_subclass_is_left_alone():
    class Mine(nn.MultiheadAttention):
        pass

    model = Attends(plain).eval()
    model.core.__class__ = Mine
    mask_head(model.core, 1)
    plan = speedup.plan(model, (torch.randn(2, 4, WIDTH),))
    assert not plan.keep and "subclass" in plan.blocked[0].reason


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_with_padding(norm_first, fastpath):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 20, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    with torch.no_grad():
        model.layers[0].self_attn.out_proj.weight[:, :6] = 0  # two heads of three columns
        model.layers[1].linear1.weight[3] = 0
        model.layers[1].linear1.bias[3] = 0
    x = torch.randn(2, 5, WIDTH)
    plan = speedup.plan(model, (x,))
    small = apply(copy.deepcopy(model), plan)
    assert small.layers[0].self_attn.num_heads == 2 and small.layers[1].linear1.out_features == 19
    for new, padding in ((torch.randn(3, 7, WIDTH), None), (x, torch.arange(5)[None] >= torch.tensor([[5], [3]]))):
        with torch.no_grad():
            outputs = [m(new, src_key_padding_mask=padding) for m in (model, small)]
        if padding is not None:  # nested tensors give zeros where padded
            outputs = [out.masked_fill(padding[..., None], 0.0) for out in outputs]
        assert verify(*outputs) < 1e-5


def test_vision_transformer_by_its_coupling_and_a_saved_plan(tmp_path, fastpath):
    def build():
        torch.manual_seed(0)
        return torchvision.models.VisionTransformer(8, 4, 2, 4, WIDTH, 16, num_classes=3)

    model = build().eval()
    nn.init.normal_(model.heads.head.weight)
    x = torch.randn(1, 3, 8, 8)
    coupled = speedup.coupling(model, (x,))
    heads = [g for g in coupled.groups if g.num_units == 4 and not g.blocked]
    assert len(heads) == 2
    speedup.mask_units(model, heads[0], torch.tensor([0, 2]))
    speedup.plan(model, (x,)).save(tmp_path)
    again = apply(build(), Plan.load(tmp_path))
    small = apply(copy.deepcopy(model), Plan.load(tmp_path))
    again.load_state_dict(small.state_dict())
    new = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert verify(model(new), again.eval()(new)) < 1e-5
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
