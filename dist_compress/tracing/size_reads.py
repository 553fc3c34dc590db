"""Whether the code of a model could know how large a tensor is, seen while it runs once.

A program that reads no size and gives none to an op does the same whatever the sizes are: it need not be run again to
know that it runs on fewer channels. What is not known to be blind to sizes counts as reading them.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# torch functions and methods that take no size and tell none; positions of dims, strides and scalars may be given.
_BLIND = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul __matmul__ bmm mm addmm "
    "batch_norm layer_norm embedding prelu "
    "relu relu_ relu6 hardtanh hardtanh_ leaky_relu elu selu celu silu gelu mish sigmoid sigmoid_ logsigmoid tanh "
    "hardswish hardsigmoid softplus softmax log_softmax exp log sqrt rsqrt abs clamp clamp_ neg __neg__ "
    "add add_ sub sub_ mul mul_ div div_ pow __pow__ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ "
    "__rmul__ __imul__ __truediv__ __itruediv__ square "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pad "
    "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "cat concat mean sum amax flatten permute transpose t unsqueeze contiguous detach clone float double dim "
    "is_floating_point".split()
)
_BLIND_PROPERTIES = frozenset("dtype device ndim requires_grad is_cuda is_meta is_nested is_quantized".split())
_BLIND_MODULES = frozenset(
    getattr(nn, name)
    for name in (
        "Conv1d Conv2d Conv3d Linear BatchNorm1d BatchNorm2d BatchNorm3d LayerNorm Identity Flatten "
        "ReLU ReLU6 LeakyReLU ELU SiLU GELU Mish Sigmoid Tanh Hardtanh Hardswish Hardsigmoid Softplus "
        "Dropout Dropout1d Dropout2d Dropout3d MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d "
        "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d"
    ).split()
)
# Integers of torch's layers that follow their weights; no torch mode sees who reads them.
_SIZES = frozenset(
    "in_features out_features in_channels out_channels num_features num_channels groups num_groups embedding_dim "
    "num_embeddings".split()
)
_NO_LAYERS = frozenset(("torch.nn.modules.module", "torch.nn.modules.container"))


@functools.cache
def names_a_size(kind: type[nn.Module]) -> bool:
    """Whether the methods of a module class, but for how it is made, name an integer of one of torch's layers.

    One of `self` is such an integer only if the class is a layer of torch with other methods.
    """
    bases = [cls for cls in kind.__mro__ if cls.__module__.startswith("torch.nn.")]
    is_layer = any(cls.__module__ not in _NO_LAYERS for cls in bases)
    own = [cls for cls in kind.__mro__ if cls not in bases and cls is not object]
    methods = [f for cls in own for name, f in vars(cls).items() if inspect.isfunction(f) and name != "__init__"]
    return any(is_layer or owner != "self" for f in methods for owner in _owners(f.__code__))


def _owners(code: CodeType) -> Iterator[str]:
    """The variable of which each name in `_SIZES` is read, "" for any other expression."""
    if not _SIZES.isdisjoint(code.co_names):
        before = None
        for instruction in dis.get_instructions(code):
            if instruction.argval in _SIZES and instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
                yield before.argval if before is not None and before.opname.startswith("LOAD_FAST") else ""
            before = instruction
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _owners(constant)


class SizeReads(TorchFunctionMode):
    """`found`: something in its block may have read a size of a tensor, or given one to an op."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self.inside = False  # a torch function: ops that run outside of one come from code that this cannot see

    def run(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """`call(module, ...)`; the calls inside a layer of torch that is blind are not looked at, to save time."""
        hooks = module._forward_hooks or module._forward_pre_hooks
        if type(module) not in _BLIND_MODULES or hooks:
            return call(module, *args, **kwargs)
        before, self.inside = self.inside, True
        try:
            with torch._C.DisableTorchFunction():
                return call(module, *args, **kwargs)
        finally:
            self.inside = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name not in _BLIND and not (name == "__get__" and func.__self__.__name__ in _BLIND_PROPERTIES):
            self.found = True
        before, self.inside = self.inside, True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = before
