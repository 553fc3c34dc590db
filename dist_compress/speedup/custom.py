"""Rules of the user's own ops and module classes, by `register_op`; the one-liners are in one_liners.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

from dist_compress.errors import UserError
from dist_compress.speedup.rule import Rule
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import ModuleCall, Op

_METHODS = ("link", "taint", "nonzero", "live", "names", "resize", "replace")
_ops: dict[str, Rule] = {}  # "namespace::name" or "namespace::name.overload"
_modules: dict[type[nn.Module], Rule] = {}


def register_op(target: Any, rule: Any = None) -> Any:
    """From now on `target` follows `rule`: in tracing, coupling, MAC counts and replacement alike. Local.

    target: an op (`torch.ops.my.op`, one overload of it, or what `torch.library.custom_op` returns) or a subclass of
    `nn.Module`, which is then a leaf: its forward is not looked into, and its subclasses follow the rule too.
    rule: a one-liner such as `Pointwise()`, or a `Rule` or a class with some of its methods; with `target` alone this
    is the decorator of such a class. What the class leaves out is a barrier's: right, but it keeps more.
    Raises UserError for another target, for a rule without any known method, and for a target that has a rule.
    """
    if rule is None:

        def decorate(cls: type) -> type:
            register_op(target, cls)
            return cls

        return decorate
    table, key = _place(target)
    if key in table:
        raise UserError(f"register_op: {_shown(target)} has a rule already; call unregister_op on it first.")
    made = _rule(rule)
    made.user = True
    table[key] = made
    return None


def unregister_op(target: Any) -> None:
    """Forget the rule of `target`. Raises UserError when it has none."""
    table, key = _place(target)
    if key not in table:
        raise UserError(f"unregister_op: {_shown(target)} has no rule of yours.")
    del table[key]


@contextlib.contextmanager
def registered(target: Any, rule: Any) -> Iterator[None]:
    """`register_op` for the time of a with block."""
    register_op(target, rule)
    try:
        yield
    finally:
        unregister_op(target)


def rule_for(op: Op) -> Rule | None:
    """The user's rule of an op on the tape."""
    if isinstance(op.target, ModuleCall):
        return rule_of_module(op.target.module)
    if not _ops or not isinstance(op.target, OpOverload):
        return None
    name = op.target._schema.name
    return _ops.get(f"{name}.{op.target._overloadname}", _ops.get(name))


def rule_of_module(module: nn.Module) -> Rule | None:
    """The user's rule of the class of a module, or of its nearest base that has one."""
    return next((_modules[cls] for cls in type(module).__mro__ if cls in _modules), None)


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing must not look into it."""
    return bool(_modules) and rule_of_module(module) is not None


def resized(s: Structure, kept: Callable[[int], torch.Tensor]) -> dict[str, dict[str, dict[int, torch.Tensor]]]:
    """{fqn of a leaf module: {"input0", "output0", ..., parameter name: {dim: kept index}}}, of what shrinks. Local.

    kept: the boolean keep vector of a variable. Raises UserError when two calls of one module keep different slices.
    """
    found: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for op in s.trace.tape:
        rule = rule_for(op) if isinstance(op.target, ModuleCall) else None
        if rule is None or (rule.resize is None and rule.replace is None):
            continue
        names = tensor_names(op)
        names |= {f"output{i}": ref for i, ref in enumerate(op.outputs) if ref is not None}
        keep: dict[str, dict[int, torch.Tensor]] = {}
        for name, ref in names.items():
            indices = {d: kept(var).nonzero().flatten() for d, var in enumerate(s.dims(ref))}
            indices = {d: i for d, i in indices.items() if len(i) < s.trace.info(ref).shape[d]}
            if indices:
                keep[name] = indices
        if keep and not _same(found.setdefault(op.module, keep), keep):
            raise UserError(
                f"Module {op.module!r} is called more than once and would keep different slices in each call; "
                "let link() of its rule tie or pin them."
            )
    return found


def tensor_names(op: Op) -> dict[str, Any]:
    """The tensors that go into a call of a leaf module, by name: input0, input1, ..., then its own by theirs."""
    assert isinstance(op.target, ModuleCall)
    module = op.target.module
    own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    given = len(op.inputs) - len(own)
    names = [*(f"input{i}" for i in range(given)), *own]
    return dict(zip(names, op.inputs, strict=True))


def _same(a: dict[str, dict[int, torch.Tensor]], b: dict[str, dict[int, torch.Tensor]]) -> bool:
    if a.keys() != b.keys() or any(a[name].keys() != b[name].keys() for name in a):
        return False
    return all(torch.equal(index, b[name][d]) for name, dims in a.items() for d, index in dims.items())


def _place(target: Any) -> tuple[dict[Any, Rule], Any]:
    """The table that a target belongs into, and its key there."""
    target = getattr(target, "_opoverload", target)  # what torch.library.custom_op returns
    if isinstance(target, OpOverload):
        alone = len(target._overloadpacket.overloads()) == 1
        return _ops, target._schema.name if alone else f"{target._schema.name}.{target._overloadname}"
    if isinstance(target, OpOverloadPacket):
        return _ops, target._qualified_op_name
    if isinstance(target, type) and issubclass(target, nn.Module) and target is not nn.Module:
        return _modules, target
    if isinstance(target, type) and issubclass(target, torch.autograd.Function):
        raise UserError(
            f"register_op: {target.__name__} is an autograd.Function, which tracing looks into: register the op that "
            "its forward calls, or the module class around it."
        )
    raise UserError(
        f"register_op: {target!r} is neither an op (torch.ops.my.op, torch.library.custom_op) nor a subclass of "
        "nn.Module. Make the function a custom op, or call it in a module of its own."
    )


def _rule(rule: Any) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, type) and any(hasattr(rule, name) for name in _METHODS):
        cls = rule if issubclass(rule, Rule) else type(rule.__name__, (rule, Rule), {})
        return cls()
    raise UserError(
        f"register_op: {rule!r} is no rule; give a one-liner such as Pointwise(), or a class with some of the methods "
        f"{', '.join(_METHODS)}."
    )


def _shown(target: Any) -> str:
    return getattr(target, "__qualname__", None) or str(target)
