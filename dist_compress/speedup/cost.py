"""What a model costs, measured: MACs, parameters, bytes, latency.

MACs are half of what torch's FlopCounterMode counts: contractions (convolutions, matrix products, attention);
element-wise work and normalisation are not in them, as in the literature's tables.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from dist_compress.tracing.untouched import plain_attention


def macs(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Multiply-accumulates of one forward pass in evaluation mode; of one sample if the batch is 1. Local."""
    counter = FlopCounterMode(display=False)
    # The fused kernels of attention are opaque to the counter.
    with _evaluating(model), plain_attention(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*args, **(kwargs or {}))
    return counter.get_total_flops() // 2


def layer_costs(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, dict[str, int]]:
    """{module fqn: {"channels", "params", "macs"}} of every module with a weight of two or more dims, in model order.

    `channels` are its output channels or features. MACs are of this one call, as in `macs`. Local.
    """
    counter = FlopCounterMode(display=False)
    with _evaluating(model), plain_attention(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*args, **(kwargs or {}))
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    costs = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() >= 2:
            channels = getattr(module, "out_channels", weight.shape[0])  # transposed convolutions have them in dim 1
            params = sum(p.numel() for p in module.parameters(recurse=False))
            costs[name] = {"channels": channels, "params": params, "macs": flops.get(name, 0) // 2}
    return costs


def num_params(model: nn.Module) -> int:
    """Elements of all parameters, tied ones once. Local."""
    return sum(p.numel() for p in model.parameters())


def num_bytes(model: nn.Module) -> int:
    """Bytes of the tensors a weights file of this model holds: parameters and persistent buffers. Local."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def latency(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    time_s: float = 1.5,
    num_threads: int = 1,
) -> dict[str, dict[str, float]]:
    """{"b1": {"p50": ms, "p90": ms}, "b32": ...} of one forward pass. See `latencies`."""
    return latencies({"": model}, args, kwargs, batch_sizes, time_s, num_threads)[""]


def latencies(
    models: Mapping[str, nn.Module],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    time_s: float = 1.5,
    num_threads: int = 1,
) -> dict[str, dict[str, dict[str, float]]]:
    """Median and 90th percentile of a forward pass in ms: {model: {"b1": {"p50": , "p90": }, ...}}. Local.

    The models take turns call by call, so that what else the machine does falls on all of them alike. In
    evaluation mode, without gradients, on `num_threads` CPU threads, the device awaited. Batches are made by
    repeating the samples of the example, whose tensors have the batch in dim 0. `time_s` bounds it in all; a
    batch so slow that it does not fit is still called once to warm up and once to measure.
    """
    times: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for size in batch_sizes:
            inputs = resize_batch((args, dict(kwargs or {})), size)
            measured = _take_turns(models, *inputs, time_s / len(batch_sizes))
            for name, seconds in measured.items():
                ms = torch.tensor(seconds, dtype=torch.float64) * 1e3
                times[name][f"b{size}"] = {"p50": ms.quantile(0.5).item(), "p90": ms.quantile(0.9).item()}
    finally:
        torch.set_num_threads(threads)
    return times


def resize_batch(inputs: Any, size: int) -> Any:
    """Every tensor [B, ...] of a nest as [size, ...], by dropping or repeating samples; scalars unchanged."""

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        return leaf[torch.arange(size, device=leaf.device) % leaf.shape[0]]

    return tree_map(resize, inputs)


def _take_turns(
    models: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], time_s: float
) -> dict[str, list[float]]:
    """Seconds of each call. The order turns round every time, as the second caller finds warmer caches."""
    order = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    end = time.perf_counter() + time_s
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        for name in order:
            with _evaluating(models[name]):
                _synchronize()
                start = time.perf_counter()
                models[name](*args, **kwargs)
                _synchronize()
            seconds[name].append(time.perf_counter() - start)
        order.reverse()
        rounds += 1
    warmup = max(1, rounds // 10)
    return {name: values[warmup:] for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own flag comes back."""
    training = {module: module.training for module in model.modules()}
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
