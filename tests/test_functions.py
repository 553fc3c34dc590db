"""Calls of functions: all spellings, what counts and what does not, nesting, errors, copies, checkpointing."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from dist_compress.errors import UserError
from dist_compress.functions import AttentionCall, Call, Calls, Watched
from dist_compress.recompute import Recompute, recomputing


class Script(nn.Module):
    """Runs a function of (itself, x, y)."""

    def __init__(self, run, child: nn.Module | None = None) -> None:
        super().__init__()
        self.run, self.child = run, child

    def forward(self, x: torch.Tensor, y: torch.Tensor, *, more: int = 0) -> torch.Tensor:
        return self.run(self, x, y)


def watched(module: nn.Module, function: str, num: int, *indices: int) -> list[Call]:
    calls = [AttentionCall(num) if function == "scaled_dot_product_attention" else Call(function, num) for _ in indices]
    for index, call in zip(indices, calls, strict=True):
        module.add_module(f"{function}_{index}", call)
    Watched(module, "net")
    return calls


X, Y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
SPELLINGS = {
    "add": ["x + y", "torch.add(x, y)", "torch.add(input=x, other=y)", "x.add(y)", "x.add(other=y)", "x.add_(y)",
            "x.__iadd__(y)"],
    "mul": ["x * y", "torch.mul(x, y)", "torch.multiply(x, other=y)", "x.mul(y)", "x.mul_(y)"],
    "matmul": ["x @ y", "torch.matmul(x, y)", "torch.mm(x, mat2=y)", "x.matmul(y)", "torch.bmm(x[None], y[None])[0]"],
    "cat": ["torch.cat([x, y])", "torch.cat(tensors=(x, y), dim=0)", "torch.concat((x, y))"],
}  # fmt: skip


@pytest.mark.parametrize(("function", "text"), [(f, text) for f, texts in SPELLINGS.items() for text in texts])
def test_every_spelling_is_one_call_of_its_two_operands(function, text):
    module = Script(lambda _, x, y: eval(text, {"torch": torch, "x": x, "y": y}))
    wanted = module(X.clone(), Y)
    seen = []
    (call,) = watched(module, function, 1, 0)
    call.register_forward_hook(lambda _, operands, output: seen.append((*operands, output)))
    assert torch.equal(module(X.clone(), Y), wanted)
    ((first, second, output),) = seen
    assert torch.equal(first.reshape(2, 2), X) and torch.equal(second.reshape(2, 2), Y)
    assert torch.equal(output.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("text", ["F.softmax(x, -1)", "x.softmax(-1)", "torch.softmax(input=x, dim=-1)"])
def test_softmax_has_one_operand(text):
    module = Script(lambda _, x, y: eval(text, {"torch": torch, "F": F, "x": x}))
    (call,) = watched(module, "softmax", 1, 0)
    call.register_forward_pre_hook(lambda _, operands: (operands[0] * 0,))
    assert torch.equal(module(X, Y), torch.full((2, 2), 0.5))


def test_what_is_put_in_and_out_is_what_the_function_gets_and_the_model_sees():
    module = Script(lambda _, x, y: torch.add(x, y, alpha=2) + 1.0)
    (call,) = watched(module, "add", 1, 0)
    call.register_forward_pre_hook(lambda _, operands: (operands[0] + 0.5, operands[1] * 10))
    call.register_forward_hook(lambda _, operands, output: -output)
    assert torch.equal(module(X, Y), -(X + 0.5 + 20 * Y) + 1)  # the second call of add has a number: it does not count


def test_in_place_calls_change_their_tensor_and_train():
    def run(_, x, y):
        z = x * 1.0
        alias = z.view(-1)
        z += y
        return alias.view(2, 2) * 3

    module = Script(run)
    (call,) = watched(module, "add", 1, 0)

    def square(_, operands):  # saves its operand for the backward pass, which must not have been overwritten
        return operands[0].square(), operands[1]

    call.register_forward_pre_hook(square)
    x = X.clone().requires_grad_()
    out = module(x, Y)
    assert torch.equal(out, 3 * (X.square() + Y))
    out.sum().backward()
    assert torch.equal(x.grad, 6 * X)
    with torch.no_grad():
        assert torch.equal(module(X, Y), out)
    with torch.inference_mode():
        assert torch.equal(module(X, Y), out)


def test_only_floating_point_tensors_count():
    def run(_, x, y):
        index = torch.arange(2) + torch.arange(2)
        return x + y + 2.0 + index[0] + torch.add(x, 1) + torch.add(x, y, out=torch.empty(2, 2))

    module = Script(run)
    seen = []
    calls = watched(module, "add", 3, 0, 1, 2)  # x + y, ... + add(x, 1), ... + add(x, y, out=...)
    for i, call in enumerate(calls):
        call.register_forward_hook(lambda *_, i=i: seen.append(i))
    assert torch.equal(module(X, Y), X + Y + 2 + X + 1 + X + Y)
    assert seen == [0, 1, 2]


def test_calls_of_modules_inside_do_not_count_and_theirs_are_their_own():
    inner = Script(lambda _, x, y: x + y + y)
    outer = Script(lambda self, x, y: self.child(x + y, y) + (lambda z: z + x)(y), inner)
    wanted = outer(X, Y)
    seen = []
    for module, name, num in ((outer, "outer", 3), (inner, "inner", 2)):
        for i, call in enumerate(watched(module, "add", num, *range(num))):
            call.register_forward_hook(lambda *_, name=name, i=i: seen.append((name, i)))
    assert torch.equal(outer(X, Y), wanted)
    assert seen == [("outer", 0), ("inner", 0), ("inner", 1), ("outer", 1), ("outer", 2)]
    plain = Script(lambda self, x, y: self.child(x, y) + self.child(x, y), nn.Identity())  # not watched: invisible
    plain.child = Script(lambda _, x, y: x + y)
    (call,) = watched(plain, "add", 1, 0)
    call.register_forward_hook(lambda *_: torch.zeros(()))
    assert float(plain(X, Y)) == 0


def test_a_module_inside_of_itself_counts_each_forward_anew():
    def run(self, x, y):
        return x + y if x.numel() == 1 else self(x[:1, :1], y[:1, :1]) + x

    module = Script(run)
    seen = []
    (call,) = watched(module, "add", 1, 0)
    call.register_forward_hook(lambda _, operands, output: seen.append(operands[1].numel()))
    module(X, Y)
    module(X, Y)
    assert seen == [1, 4, 1, 4]


def test_another_number_of_calls_is_an_error_at_once():
    module = Script(lambda self, x, y: x + y + y if self.training else x + y)
    watched(module, "add", 2, 0)
    module(X, Y)
    with pytest.raises(UserError, match="net: its forward calls add 1 times, but 2 times on the example input"):
        module.eval()(X, Y)
    more = Script(lambda _, x, y: x + y + y)
    watched(more, "add", 1, 0)
    with pytest.raises(UserError, match="net: its forward calls add more than 1 times, but 1 times"):
        more(X, Y)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left_behind(error):
    def run(self, x, y):
        x = x + y
        if self.training:
            raise error("no")
        return x

    module = Script(run)
    watched(module, "add", 1, 0)
    with pytest.raises(error):
        module(X, Y)
    assert not _get_current_function_mode_stack()
    assert torch.equal(module.eval()(X, Y), X + Y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_runs_again_in_the_backward_pass_counts_from_zero(reentrant):
    inner = Script(lambda _, x, y: (x + y) * (y + x))
    outer = Script(lambda self, x, y: checkpoint(self.child, x, y, use_reentrant=reentrant), inner)
    seen = []
    for i, call in enumerate(watched(inner, "add", 2, 0, 1)):
        call.register_forward_hook(lambda _, operands, output, i=i: (seen.append(i), output * (i + 1))[1])
    x = X.clone().requires_grad_()
    out = outer(x, Y)
    assert torch.equal(out, 2 * (X + Y).square())
    out.sum().backward()
    assert torch.equal(x.grad, 4 * (X + Y)) and seen == [0, 1, 0, 1]


def test_a_forward_that_runs_again_without_its_module_counts_from_zero():
    """As `train.activation_checkpointing` does it."""
    module, again, seen = Script(lambda _, x, y: (x + y) * (y + x)), Recompute(["Script"]), []
    for i, call in enumerate(watched(module, "add", 2, 0, 1)):
        call.register_forward_hook(lambda _, operands, output, i=i: output * (i + 1))
        call.register_forward_hook(lambda *_, i=i: seen.append((i, recomputing())))
    again.put_on(module)
    x = X.clone().requires_grad_()
    module(x, Y).sum().backward()
    assert torch.equal(x.grad, 4 * (X + Y)) and seen == [(0, False), (1, False), (0, True), (1, True)]
    again.take_off()
    assert isinstance(module.forward, Watched)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_of_a_forward_that_runs_again_alone_is_refused(reentrant):
    module = Script(lambda _, x, y: x * checkpoint(lambda z: z + y, x, use_reentrant=reentrant))
    watched(module, "add", 1, 0)
    with pytest.raises(UserError, match="net: add_0 is a target, but is called inside of torch.utils.checkpoint"):
        module(X.clone().requires_grad_(), Y)


def test_autocast_is_that_of_the_model():
    module = Script(lambda _, x, y: x @ y)
    watched(module, "matmul", 1, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(X, Y).dtype == torch.bfloat16


def test_a_copy_runs_its_own_calls():
    module = Script(lambda self, x, y: (x + y) * self.factor)
    module.factor = nn.Parameter(torch.ones(()))
    watched(module, "add", 1, 0)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.factor.fill_(2)
    twin.add_0.register_forward_hook(lambda _, operands, output: output + 1)
    assert torch.equal(module(X, Y), X + Y) and torch.equal(twin(X, Y), 2 * (X + Y + 1))
    assert module.state_dict().keys() == {"factor"}
    assert inspect.signature(twin.forward) == inspect.signature(Script(None).forward)
    module.forward.remove()
    assert "forward" not in vars(module) and torch.equal(module(X, Y), X + Y)


def attention(part: str | None, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """(as torch computes it, in steps) of one example; all parts when none is named."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=generator)
    k = torch.randn(2, 2 if more.get("enable_gqa") else 4, 7, 8, generator=generator)
    v = torch.randn(2, k.shape[1], 7, 3, generator=generator)
    module = Script(lambda _, q, k: F.scaled_dot_product_attention(q, k, value=v, **more))
    wanted = module(q, k)
    (call,) = watched(module, "scaled_dot_product_attention", 1, 0)
    for name in [part] if part else ["matmul_0", "softmax_0", "matmul_1"]:
        call.add_module(name, Call(name[:-2], 1))
    return wanted, module(q, k)


@pytest.mark.parametrize("part", [None, "matmul_0", "softmax_0", "matmul_1"])
def test_attention_in_steps(part):
    torch.testing.assert_close(*attention(part))


def test_attention_in_steps_takes_all_arguments():
    bool_mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    bool_mask[2] = False  # a query that sees nothing: 0, no NaN
    for more in (
        {"is_causal": True}, {"scale": 0.2}, {"enable_gqa": True}, {"attn_mask": bool_mask},
        {"attn_mask": torch.where(bool_mask, 0.5, float("-inf"))},
    ):  # fmt: skip
        torch.testing.assert_close(*attention(None, **more))
    _, dropped = attention("softmax_0", dropout_p=1.0)
    assert not dropped.any()


def test_parts_of_attention_are_what_they_are_called():
    seen = {}
    module = Script(lambda _, x, y: F.scaled_dot_product_attention(x, y, y))
    (call,) = watched(module, "scaled_dot_product_attention", 1, 0)
    for name in ("matmul_0", "softmax_0", "matmul_1"):
        call.add_module(name, Call(name[:-2], 1))
        call._modules[name].register_forward_hook(lambda _, ops, out, name=name: seen.update({name: (*ops, out)}))
    module(X, Y)
    assert torch.equal(seen["matmul_0"][1], Y.T) and torch.equal(seen["matmul_0"][2], X @ Y.T)
    torch.testing.assert_close(seen["softmax_0"][1], torch.softmax(X @ Y.T / 2**0.5, -1))
    assert torch.equal(seen["matmul_1"][0], seen["softmax_0"][1]) and torch.equal(seen["matmul_1"][1], Y)


def test_calls_sees_only_what_it_is_asked_for():
    module = Script(lambda _, x, y: x + x * y)
    with Calls(module, ("add",), lambda *_: pytest.fail("not in the forward of a module")) as mode:
        assert torch.equal(X + Y, X + Y)
    assert not mode.counts
