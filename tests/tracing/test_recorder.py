"""concrete_trace: the graph is the program, at new inputs and other sizes, whatever python did in between."""

import threading

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from dist_compress import concrete_trace
from dist_compress.config import ModelConfig
from dist_compress.errors import UserError
from dist_compress.models import build


def difference(a, b):
    """max |a - b| over all tensors of two nests of one structure."""
    a, b = ([t for t in tree_leaves(nest) if isinstance(t, torch.Tensor)] for nest in (a, b))
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


def assert_same_program(model, *inputs, kwargs=({}, {}, {})):
    """Traced on the first input; the graph equals the model on all of them."""
    model.eval()
    graph = concrete_trace(model, inputs[0], kwargs[0])
    graph.graph.lint()
    with torch.no_grad():
        for args, kw in zip(inputs, kwargs, strict=False):
            wanted, found = model(*args, **kw), graph(*args, **kw)
            assert type(found) is type(wanted)
            assert difference(found, wanted) == 0
    return graph


def images(*sizes, side=64):
    return [(torch.randn(b, 3, side, side),) for b in sizes]


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_the_cifar_nets(name):
    model = build(ModelConfig(name=name), num_classes=10, seed=0)
    graph = assert_same_program(model, *images(2, 2, 3, side=32))
    assert graph.get_parameter("layer1.0.conv1.weight") is model.layer1[0].conv1.weight
    assert set(graph.state_dict()) == set(model.state_dict())
    kinds = {node.op for node in graph.graph.nodes}
    assert kinds == {"placeholder", "get_attr", "call_module", "call_function", "call_method", "output"}


TORCHVISION = (
    "resnet18 resnext50_32x4d wide_resnet50_2 vgg11_bn mobilenet_v2 mobilenet_v3_small densenet121 squeezenet1_1 "
    "googlenet efficientnet_b0 regnet_y_400mf vit_b_32 shufflenet_v2_x0_5 swin_t convnext_tiny"
).split()


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    kwargs = {"vit_b_32": {"image_size": 64}, "googlenet": {"init_weights": True}}.get(name, {})
    torch.manual_seed(0)
    assert_same_program(torchvision.models.get_model(name, weights=None, **kwargs), *images(2, 2, 3))


@pytest.mark.parametrize("name", ["levit_128s", "mobilenetv4_conv_small", "xcit_nano_12_p16_224"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    assert_same_program(timm.create_model(name), *images(1, 2, side=224))


def tokens(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": torch.randint(3, 99, (batch, length)), "attention_mask": mask}


TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", ["Bert", "Llama", "ViT"])
def test_hugging_face_by_keyword_at_other_batch_and_length(name):
    transformers = pytest.importorskip("transformers")
    if name == "ViT":
        config = transformers.ViTConfig(**{**TEXT, "vocab_size": 0, "image_size": 32, "patch_size": 8})
        model = transformers.ViTForImageClassification(config)
        calls = [{"pixel_values": torch.randn(b, 3, 32, 32)} for b in (2, 2, 3)]
    else:
        config = getattr(transformers, f"{name}Config")(**TEXT)
        model = getattr(transformers, {"Bert": "BertModel", "Llama": "LlamaForCausalLM"}[name])(config)
        calls = [tokens(2, 7), tokens(2, 7), tokens(3, 9)]
    graph = assert_same_program(model, (), (), (), kwargs=calls)
    assert graph.meta["opaque_outputs"] == (["_lifted_0"] if name == "Llama" else [])  # the cache


class Sizes(nn.Module):
    def forward(self, x):
        b, c, h, w = x.shape
        patches = x.reshape(b, c, h // 2, 2, -(-w // 2), x.size(3) % 2 + 2).permute(0, 2, 4, 1, 3, 5)
        extra = torch.arange(2 * b - 1, device=x.device) + x.new_zeros(b * 2 - 1)
        return patches.reshape(b, -1, 4 * c), extra, (x.numel() - 1, {"batch": b})


def test_sizes_are_computed_again():
    model = Sizes()
    graph = concrete_trace(model, (torch.randn(2, 3, 4, 6),))
    x = torch.randn(5, 3, 8, 2)
    (a, b, (n, sizes)), (a2, b2, (n2, sizes2)) = graph(x), model(x)
    assert torch.equal(a, a2) and torch.equal(b, b2) and n == n2 and sizes == sizes2 == {"batch": 5}


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x):
        y = x * 2
        view = y[:, 1:]
        view[:, 0] = 7.0
        F.relu_(y[0])
        view.data = view.data
        self.count += 1
        x += 1
        torch.add(x, 1, out=x)
        return y + x + self.count


def test_changes_in_place_through_views_survive_dead_code_elimination():
    model, x = InPlace().eval(), torch.randn(3, 4)
    before = x.clone()
    graph = concrete_trace(model, (x,))
    assert torch.equal(x, before) and model.count == 0
    x = torch.randn(2, 4)
    wanted = model(x.clone())
    model.count.zero_()
    assert torch.equal(graph(x.clone()), wanted) and model.count == 1
    assert "count" not in graph.state_dict()


class Everything(nn.Module):
    """Nested arguments, an int, a flag, constants, modules in a list, and a module made on the fly."""

    def __init__(self):
        super().__init__()
        self.free = [nn.Linear(4, 4)]
        self.table = torch.arange(4.0)
        self.tied = nn.Linear(4, 4)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.alias = self.tied

    def forward(self, pair, *more, bag, scale=2, flag=True, note="x"):
        x = pair[0] + pair[1]["deep"] + more[0] * scale
        x = self.free[0](x) + self.table + self.alias(x) + F.linear(x, self.tied.weight)
        x = F.linear(nn.Flatten()(x), self.norm.weight)
        return {"out": x if flag else -x, "rest": [bag.unbind(0)[0], note, None, (torch.max(bag, 0),)]}


def test_arguments_constants_and_outputs_of_any_shape():
    def call(b):
        args = ((torch.randn(b, 4), {"deep": torch.randn(b, 4)}), torch.randn(b, 4))
        return args, {"bag": torch.randn(3, b), "scale": b, "flag": False, "note": "y"}

    model = Everything()
    (args, kwargs), others = call(2), [call(3), call(2)]
    graph = assert_same_program(model, args, *(a for a, _ in others), kwargs=(kwargs, *(k for _, k in others)))
    assert sorted(set(graph.meta["lifted"].values())) == [""]
    kept = {type(getattr(graph, name)).__name__ for name in graph.meta["lifted"]}
    assert kept == {"Linear", "Tensor", "Flatten"}
    args, kwargs = call(2)
    del kwargs["note"]  # recorded constants may be left out
    assert graph(*args, **kwargs)["rest"][1] == "y"


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.forward = self.decide

    def decide(self, x):
        return x * 2 if x.sum() > 0 else x.mean().item() - x

    def forward(self, x):
        return self.inner(x) + x.abs().max().item() + len(x.tolist()) + x.detach().numpy().shape[0]


def test_what_python_read_is_listed_with_its_place():
    model = Branch()
    graph = concrete_trace(model, (torch.ones(3),))
    assert torch.equal(graph(torch.ones(3)), model(torch.ones(3)))
    read = [(s.module, s.function) for s in graph.meta["specialised"]]
    assert read == [("inner", "__bool__"), ("", "item"), ("", "tolist"), ("", "numpy")]
    assert graph.meta["specialised"][0].value is True and graph.meta["specialised"][1].value == 1.0


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            frozen = self.linear(x) * 2
            with torch.enable_grad():
                live = x.exp()
        with torch.autocast("cpu", torch.bfloat16):
            low = self.linear(x)
        return frozen, live, low, self.linear(x)


@pytest.mark.parametrize("outer", [True, False])
def test_grad_mode_and_autocast_are_part_of_the_program_and_end_with_it(outer):
    model, x = Modes().eval(), torch.randn(2, 4, requires_grad=True)
    graph = concrete_trace(model, (x,))
    with torch.set_grad_enabled(outer):
        wanted, found = model(x), graph(x)
        assert torch.is_grad_enabled() is outer and not torch.is_autocast_enabled("cpu")
    assert difference(found, wanted) == 0
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    needs = [t.requires_grad for t in found]
    assert needs[0] is False and needs[2:] == [outer, outer] and (not outer or needs[1])


class Vmapped(nn.Module):
    def forward(self, x, mask):
        def row(i, j):
            return torch.where(mask[i, j], i * 10 + j, -1) + x.sum()

        i, j = torch.arange(mask.shape[0]), torch.arange(mask.shape[1])
        return torch.vmap(torch.vmap(row, (None, 0)), (0, None))(i, j)


def test_inside_vmap():
    calls = [(torch.randn(2), torch.rand(b, n) > 0.5) for b, n in ((2, 3), (2, 3), (4, 5))]
    assert_same_program(Vmapped(), *calls)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return (x * 3 + 1).relu()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Slips(nn.Module):
    def forward(self, x):
        a, b = torch.ops.aten.split.Tensor(Double.apply(scripted(x)), 2, 1)
        return [row + b for row in a.T] + [torch.from_numpy(torch.ones(2).numpy()) + 2 ** x[:, :2]]


def test_scripted_functions_autograd_functions_and_raw_ops():
    assert_same_program(Slips(), *[(torch.randn(2, 4),) for _ in range(3)])


def test_the_users_own_graph_module_is_just_a_module():
    model = torchvision.models.resnet18(weights=None).eval()
    assert_same_program(torch.fx.symbolic_trace(model), *images(2, 3))
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.randn(2, 4),)).module()
    graph = concrete_trace(exported, (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    assert torch.equal(graph(x), exported(x))


def test_a_graph_trains_the_models_own_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    graph = concrete_trace(model, (torch.randn(2, 4),))
    graph(torch.randn(2, 4)).sum().backward()
    assert model[0].bias.grad is not None and model.training and graph.training


class Leaks(nn.Module):
    """A hook carries out what was computed inside a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layer.register_forward_hook(lambda module, args, out: setattr(self, "seen", out * 2))

    def forward(self, x):
        return self.layer(x) + self.seen


def test_a_value_that_escapes_the_recorder_is_an_error_not_a_constant():
    with pytest.raises(UserError, match="computed from the inputs"):
        concrete_trace(Leaks(), (torch.randn(2, 4),))


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return self.inner(x)


def test_everything_is_put_back_also_after_a_failure():
    autocast, vmap = torch.amp.autocast_mode.autocast, torch._functorch.vmap
    before = nn.Module.__call__, autocast.__enter__, autocast.__exit__, vmap._add_batch_dim
    model = Fails().train()
    model.inner.eval()
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"inner\.1"):
        concrete_trace(model, (torch.randn(2, 4),))
    torch.set_rng_state(state)
    concrete_trace(nn.Dropout(), (torch.ones(3),))
    assert before == (nn.Module.__call__, autocast.__enter__, autocast.__exit__, vmap._add_batch_dim)
    assert model.training and not model.inner[0].training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


class Keeps(nn.Module):
    def forward(self, x):
        self.batch = x.shape[0]
        other = threading.Thread(target=lambda: nn.Linear(2, 2)(torch.randn(1, 2)))
        other.start()
        other.join()
        return x * self.batch


def test_a_size_that_the_model_keeps_becomes_a_plain_int_and_other_threads_are_not_recorded():
    model = Keeps()
    graph = concrete_trace(model, (torch.randn(2, 4),))
    nodes = len(graph.graph.nodes)
    assert model.batch == 2 and type(model.batch + 1) is int and len(graph.graph.nodes) == nodes
    assert not graph.meta["lifted"] and graph(torch.ones(3, 1)).sum() == 9
