"""Run the real model once and write down every ATen call: no proxies, so control flow is never a reason to fail.

A `TorchDispatchMode` sees the calls; `nn.Module.__call__` is patched for the duration only to know which module
made them. Attention runs as its plain matmuls (no fused kernel, no fast path), so it needs no rule of its own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from dist_compress.errors import UserError
from dist_compress.tracing import meta_kernels
from dist_compress.tracing.blame import blame
from dist_compress.tracing.constants import known
from dist_compress.tracing.nest import opened
from dist_compress.tracing.size_reads import SizeReads
from dist_compress.tracing.tape import Info, Layout, ModuleCall, Op, Overlay, Ref, Trace, map_tensors
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.walk import buffers_of, modules_of, parameters_of


class TraceError(UserError):
    """The model's own code failed in module `module` (fqn of the innermost one), after what `recorded` holds."""

    def __init__(self, text: str, module: str, recorded: Trace):
        super().__init__(text)
        self.module, self.recorded = module, recorded


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    values: bool = False,
    leaves: Callable[[nn.Module], bool] | None = None,
    sizes: bool = False,
) -> Trace:
    """Execute `model(*args, **kwargs)` once in eval mode without gradients and return its tape. Local.

    With `values`, every tensor of the run is kept in `Trace.values` (as it was at that point of the program), else only
    those that do not depend on the inputs. A model on the meta device gets its inputs there; what it reads of values
    that no weight made is computed on the CPU.
    A module of which `leaves` is true runs unrecorded and is one op, whose target is a `ModuleCall`.
    sizes: find out whether the code looks at sizes (`Trace.reads_sizes`), which costs a little.
    Training flags, buffers, RNG state and the attention switches are as before when it returns.
    Raises UserError naming the op, the module and the line in which the model's own code failed, or a leaf that does
    more than compute its result from its arguments and its own parameters and buffers.
    """
    recorder = _Recorder(model, values, leaves)
    recorder.size_reads = SizeReads() if sizes else None
    given_args, given_kwargs = recorder.add_inputs(tuple(args)), recorder.add_inputs(dict(kwargs or {}))
    with untouched(model), _module_paths(recorder):
        try:
            with recorder, recorder.size_reads or contextlib.nullcontext():
                result = model(*given_args, **given_kwargs)
        except UserError:
            raise
        except Exception as error:
            where = blame(error, recorder.failed or type(model).__name__, recorder.failed_op)
            text = (
                f"The model failed while it was traced in eval mode, in {where}. "
                "Check the example inputs against the model's forward."
            )
            raise TraceError(text, recorder.failed or "", recorder.trace) from error
        return recorder.finish(result)


def current_ref(tensor: torch.Tensor) -> Ref | None:
    """The newest value of `tensor` on the tape that is being recorded around this call; None if it is not on it."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, _Recorder) and mode.held.get(id(tensor)) is tensor:
            return mode.current[id(tensor)]
    return None


@contextlib.contextmanager
def _module_paths(recorder: _Recorder) -> Iterator[None]:
    """Keeps `recorder.stack` while modules of the model run in this thread."""
    original = nn.Module.__call__
    thread = threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = recorder.names.get(module)
        if name is None or threading.get_ident() != thread or recorder.leaf is not None:
            return original(module, *args, **kwargs)
        recorder.stack.append(name)
        try:
            if recorder.leaves is not None and recorder.leaves(module):
                output = recorder.run_leaf(original, module, args, kwargs)
            elif isinstance(module, nn.RNNBase):
                with _unfused():
                    output = original(module, *args, **kwargs)
            elif recorder.size_reads is not None:
                output = recorder.size_reads.run(original, module, args, kwargs)
            else:
                output = original(module, *args, **kwargs)
        except Exception:
            recorder.failed = name if recorder.failed is None else recorder.failed
            raise
        finally:
            recorder.stack.pop()
        recorder.end_call(name, output)
        return output

    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = original


@functools.cache
def _writes(func: OpOverload) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that an op writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found = [args[i] if i < len(args) else kwargs.get(name) for i, name in _writes(func)]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Recurrent layers as the matmuls of their steps, not as one fused call that hides what its weights do.

    Without cuDNN, CUDA still fuses the gates of LSTM and GRU, which no rule knows: their hidden size stays there.
    """
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, values: bool, leaves: Callable[[nn.Module], bool] | None):
        super().__init__()
        self.trace = Trace()
        self.size_reads: SizeReads | None = None
        self.keep_values = values
        self.leaves = leaves
        self.leaf: set[int] | None = None  # ids of the tensors that the leaf module that runs may read
        modules = modules_of(model)
        self.names: dict[nn.Module, str] = {}  # the first name of each
        for name, module in modules.items():
            self.names.setdefault(module, name)
        self.stack: list[str] = []
        self.failed: str | None = None
        self.failed_op: str | None = None
        self.current: dict[int, Ref] = {}  # id(tensor) -> its newest value
        self.held: dict[int, torch.Tensor] = {}  # keeps the tensors alive, or ids would be reused
        self.storages: dict[int, list[int]] = {}  # storage -> ids of the tensors that share it
        self.stale: dict[int, torch.Tensor] = {}  # id(tensor) -> the other tensor through which it was written to
        self.given: dict[int, torch.Tensor] = {}  # id(argument) -> what the model gets for it
        self.trace.on_meta = any(parameter.is_meta for parameter in parameters_of(modules).values())
        self._add_state(modules)

    def _add_state(self, modules: dict[str, nn.Module]) -> None:
        for kind, named in (("param", parameters_of(modules)), ("buffer", buffers_of(modules))):
            owners: dict[int, tuple[torch.Tensor, list[str]]] = {}
            for fqn, tensor in named.items():
                owners.setdefault(id(tensor), (tensor, []))[1].append(fqn)
            for tensor, fqns in owners.values():
                self._new(tensor, kind, fqn=fqns[0], all_fqns=tuple(fqns))

    def add_inputs(self, tree: Any) -> Any:
        """Records the tensors of `tree` and returns it, on the meta device when the model is."""

        def add(leaf: torch.Tensor) -> torch.Tensor:
            if id(leaf) not in self.given:
                moved = leaf.to("meta") if self.trace.on_meta else leaf
                self.given[id(leaf)] = moved
                ref = self._new(moved, "input", dependent=True)
                self.trace.inputs.append(ref)
                if moved is not leaf:
                    self.trace.values[ref.id] = leaf
            return self.given[id(leaf)]

        return tree_map_only(torch.Tensor, add, tree)

    def finish(self, result: Any) -> Trace:
        result = opened(result)
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not leaves:
            raise UserError(
                f"The model returned {type(result).__name__} without a tensor that pytree can find; "
                "return tensors, tuples, dicts or dataclasses registered with torch.utils._pytree."
            )
        self.trace.outputs = [self._ref(leaf) for leaf in leaves]
        self.trace.result = result
        self.trace.reads_sizes = self.size_reads is None or self.size_reads.found
        return self.trace

    def end_call(self, name: str, output: Any) -> None:
        leaves = [output] if isinstance(output, torch.Tensor) else tensors_in(output)
        known = [self.current[id(leaf)] for leaf in leaves if id(leaf) in self.current]
        if len(known) == len(leaves):
            self.trace.calls.append((name, tuple(known)))

    def run_leaf(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Calls the module unrecorded and adds its one op."""
        own = [*module.parameters(), *module.buffers()]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        with _disable_current_modes():
            call_args, call_kwargs = tree_map_only(torch.Tensor, self._ref, (tuple(args), dict(kwargs)))
            inputs = tuple(self._ref(tensor) for tensor in (*given, *own))
        versions = [_version(tensor) for tensor in (*given, *own)]
        self.leaf = {id(tensor) for tensor in (*given, *own)}
        try:
            result = call(module, *args, **kwargs)
        finally:
            self.leaf = None
        if versions != [_version(tensor) for tensor in (*given, *own)]:
            raise self._not_a_leaf("writes in place into a tensor that it did not make")
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        dependent = any(self.trace.info(ref).dependent for ref in inputs)
        with _disable_current_modes():
            outputs = tuple(self._new(tensor, "value", dependent=dependent) for tensor in made)
        self.trace.tape.append(Op(ModuleCall(module), call_args, call_kwargs, inputs, outputs, self._module()))
        return result

    def _check_reads(self, args: Any, kwargs: Any) -> None:
        """A leaf sees nothing of the model but its arguments and its own state, or its rule would miss it."""
        assert self.leaf is not None
        for tensor in tree_leaves((args, kwargs)):
            if not isinstance(tensor, torch.Tensor) or id(tensor) in self.leaf or id(tensor) not in self.current:
                continue
            info = self.trace.info(self.current[id(tensor)])
            if info.dependent or info.kind in ("param", "buffer"):
                what = info.fqn or f"a tensor of shape {info.shape}"
                raise self._not_a_leaf(f"reads {what}, which is neither an argument nor its own")

    def _not_a_leaf(self, what: str) -> UserError:
        return UserError(
            f"Module {self._module()!r} has a rule of its own, so it must compute its result from its arguments and "
            f"its own parameters and buffers alone; it {what}. Change its forward, or register no rule for it."
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leaf is not None:
            self._check_reads(args, kwargs)
            return func(*args, **kwargs)
        inputs: list[Ref] = []

        def given(tensor: torch.Tensor) -> Ref:
            inputs.append(self._ref(tensor))
            return inputs[-1]

        call_args, call_kwargs = map_tensors(tuple(args), given), map_tensors(kwargs, given) if kwargs else {}
        if self.size_reads is not None and not self.size_reads.inside:
            self.size_reads.found = True
        written = _written(func, args, kwargs)
        if written:
            self._before_write(written)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            value = known(self.trace, call_args[0])
            args = args if value is None else (value,)
        try:
            result = meta_kernels.run(func, args, kwargs)
        except Exception:
            self.failed_op = self.failed_op or func._schema.name.split("::")[1]
            raise
        dependent = any([self.trace.tensors[ref.id].dependent for ref in inputs])
        leaves = list(result) if isinstance(result, (tuple, list)) else [result]
        outputs = tuple(
            [self._new(x, "value", dependent=dependent) if isinstance(x, torch.Tensor) else None for x in leaves]
        )
        self._after_write(written)
        self.trace.tape.append(Op(func, call_args, call_kwargs, tuple(inputs), outputs, self._module()))
        return result

    def _module(self) -> str:
        return self.stack[-1] if self.stack else ""

    def _new(self, tensor: torch.Tensor, kind: str, **known: Any) -> Ref:
        key, tensors = id(tensor), self.trace.tensors
        ref = Ref(len(tensors))
        tensors[ref.id] = Info(tuple(tensor.shape), tensor.dtype, kind, **known)
        if key not in self.held and tensor.layout == torch.strided:
            self.storages.setdefault(tensor.untyped_storage()._cdata, []).append(key)
        self.held[key] = tensor
        self.current[key] = ref
        if self.stale:
            self.stale.pop(key, None)
        if self.keep_values or not known.get("dependent"):
            self.trace.values[ref.id] = tensor.detach()
        return ref

    def _ref(self, tensor: torch.Tensor) -> Ref:
        """The newest value of `tensor`; a write through an alias becomes one op, an `Overlay`."""
        key = id(tensor)
        if key not in self.current:
            return self._new(tensor, "const")
        if key in self.stale:
            writer, old = self.stale.pop(key), self.current[key]
            overlay = Overlay(Layout.of(tensor), Layout.of(writer))
            if tensor.dtype == writer.dtype and not bool((overlay.index() >= 0).any()):  # other parts of the memory
                return old
            source = self.current[id(writer)]
            dependent = self.trace.info(source).dependent or self.trace.info(old).dependent
            new = self._new(tensor, "value", dependent=dependent)
            args: tuple[Any, ...] = (old, source)
            target: Any = overlay
            if tensor.dtype != writer.dtype:  # a view of the bytes: a barrier
                target, args = torch.ops.aten.as_strided_scatter.default, (old, source, [], [], 0)
            self.trace.tape.append(Op(target, args, {}, (old, source), (new,), self._module()))
        return self.current[key]

    def _aliases(self, tensor: torch.Tensor) -> list[int]:
        return self.storages.get(tensor.untyped_storage()._cdata, [])

    def _before_write(self, written: list[torch.Tensor]) -> None:
        """Values seen so far must survive the write."""
        for key in dict.fromkeys(key for tensor in written for key in self._aliases(tensor)):
            ref = self._ref(self.held[key])
            if ref.id in self.trace.values:
                self.trace.values[ref.id] = self.held[key].detach().clone()

    def _after_write(self, written: list[torch.Tensor]) -> None:
        for tensor in written:
            for key in self._aliases(tensor):
                if key != id(tensor):
                    self.stale[key] = tensor


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
