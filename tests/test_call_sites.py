"""Which calls a model makes, by name; making modules of them and taking that back; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_compress import call_sites
from dist_compress.errors import UserError
from dist_compress.functions import Call, Watched
from dist_compress.models.resnet_cifar import resnet20
from dist_compress.selection import Modules
from dist_compress.sites import Sites

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Twice a layer, added; attention; a softmax layer; a cat in a plain function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.softmax = nn.Linear(4, 4), nn.Softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer(x)
        x = x + F.scaled_dot_product_attention(x, x, x)
        return joined(self.softmax(x), x * 2)


def joined(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, -1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (block(x) for block in self.blocks)
        return a + b


def exposed(model: nn.Module, functions: set[str], names: set[str], x: torch.Tensor = X) -> Sites:
    sites = Sites(model, (x,))
    call_sites.expose(sites, functions, names, "quantization.config_list")
    return sites


def calls(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Call)]


def test_names_are_module_function_and_number():
    found = call_sites.find(Sites(Net(), (X,)))
    attention = "blocks.0.scaled_dot_product_attention_0"
    own = [f"blocks.0.{name}" for name in ("add_0", "add_1", "cat_0")]
    own += [attention, f"{attention}.matmul_0", f"{attention}.softmax_0", f"{attention}.matmul_1"]
    assert list(found) == ["add_0", *own, *(name.replace("blocks.0", "blocks.1") for name in own)]
    assert found["blocks.1.add_1"] == call_sites.Place("blocks.1.add_1", "blocks.1", "add", (2,))
    assert call_sites.inventory(call_sites.find(Sites(resnet20(), (torch.randn(1, 3, 8, 8),))).values()) == (
        "It calls add (9: layer1.0.add_0, layer1.1.add_0, layer1.2.add_0, layer2.0.add_0, layer2.1.add_0, "
        "layer2.2.add_0, ...)."
    )
    assert "calls none of add, mul" in call_sites.inventory(call_sites.find(Sites(nn.Linear(4, 4), (X,))).values())


def test_looking_leaves_the_model_as_it_was():
    model = Net()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    call_sites.find(Sites(model, (X,)))
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_only_what_is_asked_for_becomes_a_module():
    model = Net().eval()
    wanted = model(X)
    sites = exposed(model, {"cat"}, {"blocks.1.add_1", "blocks.1.scaled_dot_product_attention_0.softmax_0"})
    assert calls(model) == [
        "blocks.0.cat_0", "blocks.1.add_1", "blocks.1.cat_0", "blocks.1.scaled_dot_product_attention_0",
        "blocks.1.scaled_dot_product_attention_0.softmax_0",
    ]  # fmt: skip
    assert [site.name for site in sites.by_module["blocks.1.cat_0"]] == ["_input_0", "_input_1", "_output_0"]
    assert sites.site("blocks.1.scaled_dot_product_attention_0.softmax_0", "_output_0").shape == (2, 3, 3)
    torch.testing.assert_close(model(X), wanted)
    call_sites.hide(model, {"blocks.1.scaled_dot_product_attention_0.softmax_0", "blocks.0.cat_0"})
    assert calls(model) == [
        "blocks.0.cat_0", "blocks.1.scaled_dot_product_attention_0",
        "blocks.1.scaled_dot_product_attention_0.softmax_0",
    ]  # fmt: skip
    described = call_sites.describe(model)
    call_sites.hide(model, ())
    assert not calls(model) and not any("forward" in vars(module) for module in model.modules())
    call_sites.restore(model, described)
    assert call_sites.describe(model) == described and isinstance(model.blocks[0].forward, Watched)


def test_calls_that_are_modules_are_still_found():
    model = Net()
    wanted = call_sites.find(Sites(model, (X,)))
    exposed(model, {"add", "softmax"}, set())
    assert call_sites.find(Sites(model, (X,))) == wanted
    exposed(model, {"cat"}, set())
    assert {"add_0", "blocks.1.add_1", "blocks.1.cat_0"} <= set(calls(model))


def test_what_there_is_not_is_an_error_that_lists_what_there_is():
    model = Net()
    with pytest.raises(UserError, match=r"list: 'mul' is no call that the model makes. It calls add \(5: add_0, blo"):
        exposed(model, {"mul"}, set())
    with pytest.raises(UserError, match=r"'blocks.0.add_2' is no call that .*blocks.0.add_1, "):
        exposed(model, set(), {"blocks.0.add_2"})
    assert not calls(model)


def test_a_list_asks_by_types_and_names_that_no_module_has():
    model = Net()
    model.add_0 = nn.Identity()
    entries = [
        {"op_types": ["Linear", "add"], "exclude_op_names": ["blocks.0.add_0"]}, {"op_names": ["add_0", "layer", 3]},
        {"op_names": "add_1"}, "add", {"op_names_re": ["cat_0"]}, {"op_types": ["Conv2d", "relu"]},
    ]  # fmt: skip
    assert call_sites.asked_for(entries, model) == ({"add"}, {"blocks.0.add_0"})
    with pytest.raises(UserError, match="add_0 is a call of add and an attribute of the model"):
        exposed(model, {"add"}, set())


def test_a_pattern_means_a_call_only_with_its_type():
    model = Net()
    exposed(model, {"add"}, set())
    modules = Modules(model)
    assert modules.chosen({"op_names_re": [r"blocks\.0\."]}, "") == ["blocks.0.layer", "blocks.0.softmax"]
    assert modules.chosen({"op_names_re": [r"blocks\.0\."], "op_types": ["add"]}, "") == [
        "blocks.0.add_0", "blocks.0.add_1",
    ]  # fmt: skip
    assert modules.chosen({"op_types": ["add"], "exclude_op_names_re": ["blocks"]}, "") == ["add_0"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Sometimes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, 1) + self.inner(x, 2)


class Sometimes(nn.Module):
    def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
        for _ in range(times):
            x = x * x
        return x


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def test_calls_that_cannot_be_told_apart_and_containers_are_refused():
    assert call_sites.find(Sites(Twice(), (X,)))["inner.mul_1"].nums == (1, 2)
    with pytest.raises(UserError, match="inner.mul_0: inner runs several times, and calls mul 1 or 2 times"):
        exposed(Twice(), {"mul"}, set())
    exposed(Twice(), {"add"}, set())
    with pytest.raises(UserError, match=r"add_0: the model is a Residual \(Sequential\), which runs whatever"):
        exposed(Residual(nn.Linear(4, 4)), {"add"}, set())
