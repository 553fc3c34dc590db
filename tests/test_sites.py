"""Activations by name: what a call offers, what a hook sees and replaces, and what is refused."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dist_compress import concrete_trace
from dist_compress.errors import UserError
from dist_compress.sites import Sites, replace, see

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Result:
    logits: torch.Tensor
    past: tuple[tuple[torch.Tensor, ...], ...] = ()
    note: str = ""


class Block(nn.Module):
    def forward(self, x, mask=None, *rest, scale=1.0, states=None, **more):
        y = x * 2 + (0 if mask is None else mask)
        for other in (*rest, *more.values()):
            y = y + other
        if states is not None:
            y = y + states["a"] + states["b"][1]
        return {"sum": y, "pair": Pair(y + 1, y + 2), "whole": Result(y + 3, ((y, y + 4),))}


class Net(nn.Module):
    """Calls its block with everything that can be passed: by position, by name, more of both, in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.block, self.unused = nn.Linear(3, 3), Block(), nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, index):
        h = self.drop(self.lin(input=x))
        first = self.block(h, mask=h + 1, scale=2.0, states={"a": h, "b": [index, h]}, extra=h + 5)
        second = self.block(first["sum"], first["pair"].left, first["pair"].right)
        return second["whole"].logits + second["whole"].past[0][1], index


X, INDEX = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(2)[:, None]


def names(sites, module):
    return {site.name: site.alias for site in sites.by_module[module]}


def test_all_sites_of_a_call():
    model = Net().train()
    before = torch.get_rng_state()
    sites = Sites(model, (X,), {"index": INDEX})
    assert names(sites, "") == {
        "_input_0": "_input_x",
        "_input_1": "_input_index",
        "_output_0": "_output_0",
        "_output_1": "_output_1",
    }
    assert names(sites, "lin") == {"_input_0": "_input_input", "_output_0": "_output_0"}
    assert [n for n in names(sites, "block") if n.startswith("_input_")] == [
        "_input_0", "_input_1", "_input_states.a", "_input_states.b.0", "_input_states.b.1", "_input_extra", "_input_2",
    ]  # fmt: skip
    assert [n for n in names(sites, "block") if n.startswith("_output_")] == [
        "_output_sum", "_output_pair.0", "_output_pair.1", "_output_whole.logits", "_output_whole.past.0.0",
        "_output_whole.past.0.1",
    ]  # fmt: skip
    assert "unused" not in sites.by_module
    assert torch.equal(before, torch.get_rng_state()) and model.training and model.drop.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert sites.site("block", "_input_1").shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("_input_", ["_input_0", "_input_1", "_input_states.a", "_input_states.b.1", "_input_extra", "_input_2"]),
        ("_input_x", ["_input_0"]),
        ("_input_mask", ["_input_1"]),
        ("_input_states", ["_input_states.a", "_input_states.b.1"]),
        ("_input_states.b.1", ["_input_states.b.1"]),
        ("_output_pair", ["_output_pair.0", "_output_pair.1"]),
        ("_output_whole.past.0", ["_output_whole.past.0.0", "_output_whole.past.0.1"]),
        ("_output_s", []),
        ("_output_9", []),
    ],
)
def test_names_mean_sites(name, found):
    assert [site.name for site in Sites(Net(), (X, INDEX)).meant("block", name)] == found


def test_what_there_is_for_messages():
    sites = Sites(Net(), (X, INDEX))
    assert sites.inventory(["lin"]) == "they have _input_0 (input), _output_0."
    assert sites.inventory(["unused"]) == "unused did not run on the example input."
    with pytest.raises(UserError, match=r"block: _input_states.b.0 is torch.int64. Only floating point"):
        sites.meant("block", "_input_states.b.0")


def every_site():
    return [site.name for site in Sites(Net(), (X, INDEX)).by_module["block"]]


@pytest.mark.parametrize("name", every_site())
def test_a_tensor_is_seen_and_replaced_wherever_it_is(name):
    """By the one site of a block that is called once: what `replace` puts there is what `see` finds, and nothing else
    changes."""
    if name == "_input_2":
        args, kwargs = (X, X + 1, X + 2), {}
    else:
        args, kwargs = (X,), {"mask": X + 1, "states": {"a": X + 3, "b": [X + 4, X + 5]}, "extra": X + 6}
    block, seen = Block(), []
    put, look = replace(block, name, lambda t: t * 0 - 7, "block"), see(block, name, seen.append, "block")
    changed = block(*args, **kwargs)
    assert len(seen) == 1 and torch.equal(seen[0], torch.full_like(X, -7))
    put.remove()
    look.remove()
    plain = block(*args, **kwargs)
    assert len(seen) == 1
    flat = lambda out: [  # noqa: E731
        out["sum"], *out["pair"], out["whole"].logits, *out["whole"].past[0]
    ]  # fmt: skip
    same = [torch.equal(a, b) for a, b in zip(flat(changed), flat(plain), strict=True)]
    if name.startswith("_output_"):
        assert same.count(False) == 1 and type(changed["pair"]) is Pair and type(changed["whole"]) is Result
    elif name != "_input_states.b.0":
        assert not any(same)
    if "states" in kwargs:
        assert torch.equal(kwargs["states"]["b"][1], X + 5)  # the caller's containers are the caller's


def test_several_functions_run_in_the_order_in_which_they_came():
    lin = nn.Linear(3, 3)
    replace(lin, "_output_0", lambda t: t + 1, "lin")
    replace(lin, "_output_0", lambda t: t * 2, "lin")
    assert torch.equal(lin(X), (nn.functional.linear(X, lin.weight, lin.bias) + 1) * 2)


def test_a_call_without_the_tensor_is_an_error_that_names_all():
    block = Block()
    replace(block, "_input_1", torch.relu, "net.block")
    with pytest.raises(UserError, match=r"net.block: a call without _input_1, .* in this call: _input_0, _input_extra"):
        block(X, extra=X)
    with pytest.raises(UserError, match="a call without _input_1"):
        block(X, None)
    block = Block()
    see(block, "_output_more", print, "net.block")
    with pytest.raises(UserError, match=r"a call without _output_more.* in this call: _output_sum, _output_pair.0"):
        block(X)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Buffer(torch.tensor([1.0, 0.0, 1.0]))

    def forward(self, x):
        return x * self.mask


def test_a_module_in_the_data_flow_is_saved_copied_and_traced():
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    model[0].mask_of_output = masked = Masked()
    replace(model[0], "_output_0", masked, "0")
    assert "0.mask_of_output.mask" in model.state_dict()
    other = copy.deepcopy(model)
    other[0].mask_of_output.mask.zero_()
    assert other(X).abs().sum() == 0 and model(X)[:, 1].abs().sum() == 0 and model(X).abs().sum() > 0
    graph = concrete_trace(model, (X,))
    assert torch.equal(graph(X + 1), model(X + 1))


def test_model_outputs_keep_their_type():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Bert(nn.Module):
        def forward(self, x):
            return outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(x, x + 1))

    model = Bert()
    assert names(Sites(model, (X,)), "") == {n: n for n in ()} | {
        "_input_0": "_input_x",
        "_output_last_hidden_state": "_output_last_hidden_state",
        "_output_hidden_states.0": "_output_hidden_states.0",
        "_output_hidden_states.1": "_output_hidden_states.1",
    }
    replace(model, "_output_hidden_states.1", torch.zeros_like, "")
    replace(model, "_output_last_hidden_state", torch.neg, "")
    out = model(X)
    assert type(out) is outputs.BaseModelOutput
    assert torch.equal(out.last_hidden_state, -X) and torch.equal(out["last_hidden_state"], -X)
    assert torch.equal(out.hidden_states[0], X) and out.hidden_states[1].abs().sum() == 0


def wrapped(kind):
    """What a DDP or FSDP2 model computes with a mask in it is what the plain model does."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].mask_of_output = masked = Masked()
    replace(model[0], "_output_0", masked, "0")
    plain = copy.deepcopy(model)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        for module in (model[0], model[2], model):
            fully_shard(module)
    loss = model(X).sum()
    loss.backward()
    expected = plain(X).sum()
    expected.backward()
    assert torch.equal(loss, expected)
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    for grad, right in zip(grads, plain.parameters(), strict=True):
        torch.testing.assert_close(grad, right.grad)
    assert grads[0][1].abs().sum() == 0 and grads[0].abs().sum() > 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_before_wrapping(ranks, kind):
    ranks(2, wrapped, kind)
