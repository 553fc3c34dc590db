"""Calls of functions as modules: `x + y` in a module's forward gets a name, and tensors that go in and come out.

The n-th call of a function in the forward of module `layer1.0` is `layer1.0.add_0`, `layer1.0.add_1`, ... where a call
counts if all its operands are tensors of floating point numbers, and if it is made by that forward (or by plain
functions that it calls), not by modules inside of it. All ways to write a function are one:

    add                             x + y, x += y, torch.add, x.add(y), x.add_(y)
    mul                             x * y, x *= y, torch.mul, torch.multiply, ...
    matmul                          x @ y, torch.matmul, torch.bmm, torch.mm, ...
    cat                             torch.cat, torch.concat, torch.concatenate
    softmax                         torch.softmax, F.softmax, x.softmax
    scaled_dot_product_attention    F.scaled_dot_product_attention

`Call` is such a call as a module below the one that makes it, so hooks, names, state and copies are those of modules:
sites (dist_compress.sites) are `_input_0`, `_input_1`, ... and `_output_0`. `Watched` takes the place of the forward of
the module that makes it, and leads its calls through their `Call`; everything else is as it was. A forward that makes
another number of calls than it made on the example input is refused: the n-th would be another one.

Of scaled_dot_product_attention the operands are query, key and value. Its inner parts are calls of their own,
`scaled_dot_product_attention_0.matmul_0`, `.softmax_0` and `.matmul_1`; where one of them is wanted it is computed in
these steps, and holds the matrix of attention. An nn.MultiheadAttention that is `Watched` runs in the open
(dist_compress.multihead), or it would call nothing. Everything here is local.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dist_compress import multihead
from dist_compress.errors import UserError
from dist_compress.forwards import Forward

ATTENTION = "scaled_dot_product_attention"
PARTS = {"matmul_0": "matmul", "softmax_0": "softmax", "matmul_1": "matmul"}  # of attention
_T: Any = torch.Tensor
_IN_PLACE = {_T.add_: torch.add, _T.__iadd__: torch.add, _T.mul_: torch.mul, _T.__imul__: torch.mul,
             _T.multiply_: torch.mul}  # fmt: skip
_SPELLINGS: dict[str, tuple[Any, ...]] = {
    "add": (torch.add, _T.add, _T.__add__, _T.add_, _T.__iadd__),
    "mul": (torch.mul, torch.multiply, _T.mul, _T.multiply, _T.__mul__, _T.mul_, _T.multiply_, _T.__imul__),
    "matmul": (torch.matmul, torch.bmm, torch.mm, _T.matmul, _T.bmm, _T.mm, _T.__matmul__),
    "cat": (torch.cat, torch.concat, torch.concatenate),
    "softmax": (torch.softmax, torch.special.softmax, F.softmax, _T.softmax),
    ATTENTION: (F.scaled_dot_product_attention,),
}
_OPERANDS = {
    **dict.fromkeys(("add", "mul", "matmul"), (("input", "self"), ("other", "mat2"))),
    "softmax": (("input", "self"),),
    ATTENTION: (("query",), ("key",), ("value",)),
}  # keywords they may be passed by; of cat it is one list
FUNCTIONS = tuple(_SPELLINGS)
_FUNCTION_OF = {spelling: function for function, spellings in _SPELLINGS.items() for spelling in spellings}
_MODULE_CALL = nn.Module._call_impl.__code__
_CHECKPOINT = torch.utils.checkpoint.checkpoint.__code__.co_filename
Run = Callable[..., Any]  # (*operands) -> what the function returns


class Call(nn.Module):
    """One call of a function in the forward of the module that holds this one."""

    def __init__(self, function: str, num_calls: int) -> None:
        """`num_calls`: of `function` in each forward of that module."""
        super().__init__()
        self.function, self.num_calls = function, num_calls

    def forward(self, *operands: torch.Tensor, run: Run) -> Any:
        return run(*operands)

    def extra_repr(self) -> str:
        return self.function


class AttentionCall(Call):
    """A call of scaled_dot_product_attention; in steps where one of its `PARTS` is a module below it."""

    def __init__(self, num_calls: int = 1) -> None:
        super().__init__(ATTENTION, num_calls)

    def forward(self, *operands: torch.Tensor, run: Run) -> Any:
        if not self._modules.keys() & PARTS:
            return run(*operands)
        return _attention(self, *operands, **run.keywords)  # type: ignore[attr-defined]


class Watched(Forward):
    """Leads the calls that a module's forward makes through their `Call`."""

    def __init__(self, owner: nn.Module, where: str) -> None:
        super().__init__(owner)
        self.where = where
        self.inside = 0  # calls of modules in the forward that have not returned, where `heed` counts them

    def of_class(self) -> Callable[..., Any]:
        return multihead.forward if multihead.opens(self.owner) else type(self.owner).forward

    def heed(self) -> list[RemovableHandle]:
        """Count calls of modules in the forward: torch.compile, which runs it, has no frames to tell them by."""

        def enter(module: nn.Module, args: Any) -> None:
            self.inside += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.inside -= 1

        inner = [m for m in self.owner.modules() if m is not self.owner]
        before = [module.register_forward_pre_hook(enter, prepend=True) for module in inner]
        return [*before, *(module.register_forward_hook(leave) for module in inner)]

    def calls(self) -> dict[str, Call]:
        return {name: m for name, m in self.owner._modules.items() if isinstance(m, Call)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = self.calls()
        expected = {call.function: call.num_calls for call in calls.values()}
        counts = dict.fromkeys(expected, 0)
        self.inside = 0

        def act(function: str, index: int, operands: tuple[torch.Tensor, ...], run: Run) -> Any:
            if index >= expected[function]:
                raise self._other_number(function, f"more than {expected[function]}", expected[function])
            call = calls.get(f"{function}_{index}")
            if call is not None and not torch.compiler.is_compiling() and _recomputed(sys._getframe(1)):
                raise UserError(
                    f"{self.where or 'the model'}: {function}_{index} is a target, but is called inside of "
                    "torch.utils.checkpoint, which repeats a part of the forward without it. Checkpoint the whole "
                    "module from outside, or leave this target out."
                )
            return run(*operands) if call is None else call(*operands, run=run)

        with Calls(self.owner, expected, act, counts, lambda: self.inside > 0):
            result = self.run_inner(*args, **kwargs)
        for function, num in expected.items():
            if counts[function] != num:
                raise self._other_number(function, str(counts[function]), num)
        return result

    def _other_number(self, function: str, found: str, expected: int) -> UserError:
        return UserError(
            f"{self.where or 'the model'}: its forward calls {function} {found} times, but {expected} times on the "
            "example input. Targets are told apart by their number, so it must be the same in every forward, in "
            f"training and in evaluation. Leave {function} of this module out of the config list."
        )


_WATCHED_CALL = Watched.__call__.__code__


class Calls(TorchFunctionMode):
    """Inside, `act(function, index, operands, run)` takes the place of each call that `owner`'s forward makes of one of
    `functions`; `run(*operands)` is the call itself."""

    def __init__(
        self, owner: nn.Module, functions: Mapping[str, Any] | tuple[str, ...],
        act: Callable[[str, int, tuple[torch.Tensor, ...], Run], Any],
        counts: dict[str, int] | None = None, elsewhere: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """`counts`: of calls so far, of each function; `elsewhere`: whether another module runs, in a graph."""
        super().__init__()
        self.owner, self.functions, self.act, self.elsewhere = owner, functions, act, elsewhere
        self.counts: dict[str, int] = Counter() if counts is None else counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function = _FUNCTION_OF.get(func)
        if function is None or function not in self.functions:
            return func(*args, **kwargs)
        if self.elsewhere() if torch.compiler.is_compiling() else not _runs_in(self.owner, sys._getframe(1)):
            return func(*args, **kwargs)
        split = _split(function, func, args, kwargs)
        if split is None:
            return func(*args, **kwargs)
        operands, run = split
        index = self.counts[function]
        self.counts[function] += 1
        if func not in _IN_PLACE:
            return self.act(function, index, operands, run)
        target = operands[0]
        # What is changed in place must not be what a quantizer keeps for its backward pass.
        first = target.clone() if torch.is_grad_enabled() else target
        result = self.act(function, index, (first, *operands[1:]), run)
        return target.copy_(result)


def _runs_in(owner: nn.Module, frame: FrameType | None) -> bool:
    """Whether the innermost module that is being called is `owner`."""
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            return vars(frame.f_locals["self"]) is vars(owner)  # torch.export calls stand-ins with the same dict
        if frame.f_code is _WATCHED_CALL:  # its forward alone runs again, not the call of the module
            return frame.f_locals["self"].owner is owner
        frame = frame.f_back
    return False


def _recomputed(frame: FrameType | None) -> bool:
    """Whether a part of the innermost module's forward is run by torch.utils.checkpoint."""
    while frame is not None and frame.f_code not in (_MODULE_CALL, _WATCHED_CALL):
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def _split(
    function: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[torch.Tensor, ...], Run] | None:
    """The operands and what computes the call from them; None where the call does not count."""
    if kwargs.get("out") is not None:
        return None
    func = _IN_PLACE.get(func, func)
    if function == "cat":
        operands = tuple(args[0] if args else kwargs["tensors"])
        rest = args[1:], {key: value for key, value in kwargs.items() if key != "tensors"}
        run: Run = lambda *tensors: func(tensors, *rest[0], **rest[1])  # noqa: E731
    else:
        keywords = _OPERANDS[function]
        left = dict(kwargs)
        operands = args[: len(keywords)]
        for names in keywords[len(operands) :]:
            name = next((name for name in names if name in left), None)
            if name is None:
                return None
            operands = (*operands, left.pop(name))
        run = _Run(func, args[len(keywords) :], left)
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in operands):
        return None
    return operands, run


class _Run:
    """A function with all but its operands."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs

    def __call__(self, *operands: torch.Tensor) -> Any:
        return self.func(*operands, *self.args, **self.kwargs)

    @property
    def keywords(self) -> dict[str, Any]:
        """The other arguments of scaled_dot_product_attention by name."""
        names = ("attn_mask", "dropout_p", "is_causal")
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def _attention(
    call: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """softmax(query @ key^T * scale + mask) @ value: [..., L, E], [..., S, E], [..., S, Ev] -> [..., L, Ev]."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = part(call, "matmul_0", torch.matmul, query, key.transpose(-2, -1)) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
        else:
            scores = scores + attn_mask
    # A row that is masked whole becomes 0, as in torch's own.
    softmax = torch.softmax if attn_mask is None else torch.ops.aten._safe_softmax
    weights = F.dropout(part(call, "softmax_0", lambda x: softmax(x, -1), scores), dropout_p)
    return part(call, "matmul_1", torch.matmul, weights, value)


def part(call: nn.Module, name: str, run: Run, *operands: torch.Tensor) -> torch.Tensor:
    """`run(*operands)`, through the `Call` of this name below `call` if there is one."""
    inner = call._modules.get(name)
    return run(*operands) if inner is None else inner(*operands, run=run)
