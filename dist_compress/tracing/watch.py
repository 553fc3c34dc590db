"""What a recorder must see that no torch mode shows it: module calls, autocast regions, the levels of vmap.

Each is patched for the duration of one recording and put back whatever happens. Calls from other threads, and
calls made inside something that is recorded as a whole, go straight through.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import nn
from torch.amp import autocast_mode
from torch.fx import Node

_VMAP = ("_vmap_increment_nesting", "_add_batch_dim", "_remove_batch_dim", "_vmap_decrement_nesting")


class Watcher(Protocol):
    """What `watching` tells."""

    def active(self) -> bool: ...

    def on_module(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any: ...

    def on_function(self, function: Callable[..., Any], args: Any, kwargs: Any, impure: bool = ...) -> Any: ...

    def emit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node: ...


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Report to `watcher` until the end of the block."""
    autocast, vmap = autocast_mode.autocast, importlib.import_module("torch._functorch.vmap")
    entered: list[Node | None] = []  # autocast regions we are in

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return watcher.on_module(original_call, module, args, kwargs)

    def enter(region: Any) -> Any:
        values = (region.device, region.fast_dtype, region._enabled, region._cache_enabled)
        entered.append(watcher.emit(autocast_mode._enter_autocast, values) if watcher.active() else None)
        return original_enter(region)

    def leave(region: Any, *exception: Any) -> Any:
        node = entered.pop()
        if node is not None:
            watcher.emit(autocast_mode._exit_autocast, (node,))
        return original_leave(region, *exception)

    def on_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            return watcher.on_function(function, args, kwargs, impure=True)

        return watched

    original_call, original_enter, original_leave = nn.Module.__call__, autocast.__enter__, autocast.__exit__
    with ExitStack() as stack:
        stack.enter_context(_patched(nn.Module, "__call__", call))
        stack.enter_context(_patched(autocast, "__enter__", enter))
        stack.enter_context(_patched(autocast, "__exit__", leave))
        for name in _VMAP:
            stack.enter_context(_patched(vmap, name, on_vmap(getattr(vmap, name))))
        yield


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
