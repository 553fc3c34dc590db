"""Record the program a model runs as a torch.fx.GraphModule: by execution, not by proxies.

The real model runs once. A TorchFunctionMode sees every torch function, method, property and factory it calls,
and sizes come back as ints that remember their node (traced_int.py). Modules of torch.nn become `call_module`.
Under it, a TorchDispatchMode takes down what slips past (scripted functions, C++ extensions). As the model sees
real tensors, control flow, `isinstance`, numpy and C code just work; `meta["specialised"]` lists what they fix.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import has_side_effect
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import TensorWeakRef

from dist_compress.errors import UserError
from dist_compress.tracing.blame import blame
from dist_compress.tracing.graph_builder import GraphBuilder, has_tensor
from dist_compress.tracing.traced_int import TracedInt
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.unwrap import unwrapped
from dist_compress.tracing.watch import watching

_SIZES = ("size", "shape", "stride", "numel", "nelement")
_READS = frozenset(
    "item tolist numpy __array__ __bool__ __int__ __float__ __complex__ __index__ __contains__ "
    "equal is_nonzero allclose".split()
)


class Specialised(NamedTuple):
    """A value that the recorded graph holds fixed, because the program looked at it."""

    module: str  # fqn of the innermost module
    function: str
    value: Any


def concrete_trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    leaves: Callable[[nn.Module], bool] | None = None,
) -> GraphModule:
    """The graph of `model(*args, **kwargs)`, recorded by running it once in evaluation mode. Local.

    The graph takes the same arguments under the names of `forward`, returns the same structure, and shares the
    parameters, buffers and torch.nn modules of `model` under their names. It runs at other batch sizes unless
    the program itself fixed one. The integers of the model's own modules are `get_attr` nodes, so a replay uses what
    they are then; functional dropout follows the training mode. A module of which `leaves` is true is one
    `call_module` node, like those of torch.nn. Modes, buffers, random state and arguments are left as they were.
    `meta` has
        "specialised"     [Specialised]: what `.item()`, `bool(tensor)`, `tolist()` and the like read
        "lifted"          {attribute: module fqn}: tensors and objects that are no input, parameter or buffer
        "opaque_outputs"  [attribute]: outputs that are neither tensor nor nest (caches): the recorded objects
    Raises UserError when the model fails, or when a value computed from the inputs escapes the recorder.
    """
    model = unwrapped(model)
    recorder = _Recorder(model, leaves)
    grad_enabled = torch.is_grad_enabled()
    arguments = tree_map(_copy, (tuple(args), dict(kwargs or {})))
    run_args, run_kwargs = recorder.add_inputs(*arguments)
    try:
        with _lock, untouched(model), torch.set_grad_enabled(grad_enabled):
            with watching(recorder), recorder.traced_attributes(), _Dispatch(recorder), _Functions(recorder):
                output = model(*run_args, **run_kwargs)
        graph_module = recorder.finish(output)
        graph_module.meta["specialised"] = recorder.specialised
        return graph_module
    except UserError:
        raise
    except Exception as error:
        where = blame(error, recorder.failed or type(model).__name__, recorder.failed_op)
        raise UserError(
            f"concrete_trace: the model failed in {where}. Check the example inputs against the model's forward, and "
            "that the model runs on them in evaluation mode."
        ) from error
    finally:
        recorder.close()


def swap_grad_mode(enabled: bool) -> bool:
    """Sets grad mode and returns the one before, so that a replayed region ends in its caller's mode."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    return before


has_side_effect(swap_grad_mode)
_lock = threading.RLock()  # what `watching` patches is global


class _Recorder(GraphBuilder):
    """Turns what the running model does into nodes."""

    def __init__(self, model: nn.Module, leaves: Callable[[nn.Module], bool] | None) -> None:
        super().__init__(model)
        self.leaves = leaves
        self.specialised: list[Specialised] = []
        self.grad_switches: list[tuple[bool, Node]] = []  # (grad mode before, the swap that left it)
        self.thread = threading.get_ident()
        self.depth = 0  # above 0: inside something that is recorded as a whole
        self.failed: str | None = None  # innermost module that raised
        self.failed_op: str | None = None  # innermost torch function that raised

    def active(self) -> bool:
        return self.depth == 0 and threading.get_ident() == self.thread

    def is_leaf(self, module: nn.Module) -> bool:
        if module is self.model:
            return False
        return _is_leaf(module) or (self.leaves is not None and self.leaves(module))

    def on_module(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.active():
            return call(module, *args, **kwargs)
        self.path.append(self.modules.get(id(module), self.path[-1]))
        try:
            if not self.is_leaf(module):
                return call(module, *args, **kwargs)
            name = self._module_name(module)
            return self._record("call_module", name, lambda: call(module, *args, **kwargs), args, kwargs)
        except Exception:
            self.failed = self.failed or self.path[-1]
            raise
        finally:
            self.path.pop()

    def on_function(self, function: Callable[..., Any], args: Any, kwargs: Any, impure: bool = False) -> Any:
        if not self.active():
            return function(*args, **kwargs)
        if function is torch._C._set_grad_enabled:
            return self._on_grad_mode(args[0])
        op, target, name, arguments = _call_of(function, args)
        if name in _SIZES:
            return self._on_sizes(function, name, args, kwargs)
        return self._record(op, target, lambda: function(*args, **kwargs), arguments, kwargs, name, impure)

    def on_dispatch(self, function: Any, args: Any, kwargs: Any) -> Any:
        """An ATen call: a node if no torch function made it; else it tells what was derived from the inputs."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ours = threading.get_ident() == self.thread and any(map(self.depends_on_inputs, tensors))
        if ours and self.depth == 0:
            return self._record("call_function", function, lambda: function(*args, **kwargs), args, kwargs)
        try:
            result = function(*args, **kwargs)
        except Exception:
            self.failed_op = self.failed_op or function._schema.name.split("::")[1]
            raise
        if ours:
            made = (t for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            self.derived.update((id(t), TensorWeakRef(t)) for t in made)
        return result

    def emit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """An impure call that was not made just now through a torch function."""
        return self.add("call_function", function, args, impure=True)

    def _record(
        self,
        op: str,
        target: Any,
        run: Callable[[], Any],
        args: Any,
        kwargs: Any,
        name: str = "",
        impure: bool = False,
    ) -> Any:
        """Runs it, and adds a node if its result holds tensors or if it changed one."""
        with self._whole():
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            versions = [_version(t) for t in tensors]
            try:
                result = run()
            except Exception:
                self.failed_op = self.failed_op or name or None
                raise
            impure = impure or versions != [_version(t) for t in tensors]
            impure = impure or (result is None and bool(tensors) and target is not getattr)
            if impure or has_tensor(result):
                if "dropout" in name and kwargs.get("training") is False:
                    kwargs = kwargs | {"training": self.training_flag()}
                node = self.add(op, target, args, kwargs, impure)
                self.bind(result, node)
                if type(result) is int:
                    result = TracedInt(result, node, self.ints)
            elif type(result) is torch.device and tensors and self.is_known(tensors[0]):
                self.devices.setdefault(result, self.add(op, target, args, kwargs))
            elif name in _READS:
                self.specialised.append(Specialised(self.path[-1], name, result))
            return result

    def _on_sizes(self, function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        """Ints that know their node, for sizes of what depends on the inputs or on parameters."""
        with self._whole():
            value, tensor = function(*args, **kwargs), args[0]
            if not self.is_known(tensor) and id(tensor) not in self.names:
                return value
            if isinstance(value, int):
                return TracedInt(value, self.add("call_method", name, args, kwargs), self.ints)
            method = "stride" if name == "stride" else "size"
            nodes = [self.add("call_method", method, (tensor, dim)) for dim in range(len(value))]
            ints = [TracedInt(v, node, self.ints) for v, node in zip(value, nodes, strict=True)]
            return torch.Size(ints) if isinstance(value, torch.Size) else tuple(ints)

    def _on_grad_mode(self, enabled: bool) -> None:
        """Regions nest: a switch back to the mode of the region's start ends it, in whatever mode replay began."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(enabled)
        if enabled == before:
            return
        if self.grad_switches and self.grad_switches[-1][0] == enabled:
            self.emit(torch._C._set_grad_enabled, (self.grad_switches.pop()[1],))
        else:
            self.grad_switches.append((before, self.emit(swap_grad_mode, (enabled,))))

    def _module_name(self, module: nn.Module) -> str:
        """Its fqn; a module that the model does not register (in a list, made in forward) is lifted."""
        name = self.modules.get(id(module))
        if name is None:
            name = self.modules[id(module)] = self.lift(module)
        self.attributes[name] = module
        return name

    @contextmanager
    def _whole(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.on_function(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.on_dispatch(func, args, kwargs or {})


# By identity, since a method's __name__ is not its name: Tensor.__pow__.__name__ == "pow". Public names win.
_METHODS = {id(getattr(torch.Tensor, n)): n for n in sorted(dir(torch.Tensor), key=lambda n: n[0] != "_")}


def _call_of(function: Any, args: Any) -> tuple[str, Any, str, Any]:
    """(op, target, name, args) of the node that repeats a torch function."""
    name = _METHODS.get(id(function))
    descriptor = getattr(function, "__self__", None)
    if name in ("__getitem__", "__setitem__"):
        return "call_function", getattr(operator, name.strip("_")), name, args
    if name == "__deepcopy__":
        return "call_method", "clone", name, args[:1]
    if name is not None:
        return "call_method", name, name, args
    if id(descriptor) in _METHODS and function.__name__ in ("__get__", "__set__"):
        name = _METHODS[id(descriptor)]
        accessor = getattr if function.__name__ == "__get__" else setattr
        value = args[1:] if accessor is setattr else ()
        return "call_function", accessor, name, (args[0], name, *value)
    return "call_function", function, getattr(function, "__name__", ""), args


def _is_leaf(module: nn.Module) -> bool:
    """A layer of torch.nn, or a scripted module; not what only holds other modules, nor a bare nn.Module."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or type(module) is nn.Module:
        return False
    return type(module).__module__.startswith("torch.nn.") or isinstance(module, torch.jit.ScriptModule)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _copy(leaf: Any) -> Any:
    """An argument that the model may change in place without touching the caller's."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)
