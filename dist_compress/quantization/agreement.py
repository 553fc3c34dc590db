"""Masked and shrunk agree when they are quantized, too: the same scales, and sums over fewer zeros.

Sums in another order differ in their last bits, and where a value lies between two levels that is a whole level. In
float64 this does not happen (a tie within 1e-16), so there both models must give the same numbers. A sharded model is
no rank's alone: every rank calls it as it is, in the precision of the run and with float activations, which leaves the
quantized weights to be compared, and of sums their last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dist_compress import comm
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.verify import verify

FOLD_TOLERANCE = 1e-4  # largest difference of the folded from the simulated model
Call = tuple[tuple[Any, ...], dict[str, Any]]


def ask(
    model: nn.Module, example: Call, floating: Callable[[], AbstractContextManager[None]],
    rest: Callable[[], None] | None,
) -> Agreement:  # fmt: skip
    """The answers of the masked model. `floating`: a context in which its activations are float. `rest`: of a sharded
    model, what lets every rank hold its part only. Collective."""
    return Agreement(model, example) if rest is None else ShardedAgreement(model, example, floating, rest)


class Agreement:
    """What the masked model answers, before it is shrunk in place. Rank 0 holds it. Collective."""

    precision = "in float64"

    def __init__(self, model: nn.Module, example: Call) -> None:
        self.model, self.example = model, example
        self.answers: list[Any] | None = None
        self._remember()

    def _remember(self) -> None:
        def ask() -> None:
            try:
                self.answers = outputs(self.model, self.example)
            except (RuntimeError, TypeError, ValueError):  # code that makes tensors of a type of its own
                self.answers = None

        comm.on_rank0(ask)

    def check(self, tolerance: float | None) -> float | None:
        """max|shrunk - masked| / max|masked|, the same on every rank; None where the model does not run in float64.
        Raises RuntimeError if it is above `tolerance`; None: scales differ, so this is no law. Collective."""
        difference = self._difference()
        if difference is not None and tolerance is not None and not difference <= tolerance:
            raise RuntimeError(
                f"masked and shrunk model differ by {difference:.3g} (relative) when they are quantized, with the same "
                f"scales and {self.precision}: more than speedup.tolerance={tolerance:g}. Nothing is exported."
            )
        return difference

    def notes(self, difference: float | None) -> list[str]:
        """Lines for the user, of what was not compared. `difference`: what `check` said. Local."""
        unknown = "the quantized model does not run in float64: masked and shrunk were compared as floats only"
        return [unknown] if difference is None else []

    def _difference(self) -> float | None:
        def compare() -> float | None:
            return None if self.answers is None else verify(self.answers, outputs(self.model, self.example))

        return comm.on_rank0(compare)


class ShardedAgreement(Agreement):
    """Of a model that every rank has to call."""

    precision = "with float activations"

    def __init__(
        self, model: nn.Module, example: Call, floating: Callable[[], AbstractContextManager[None]],
        rest: Callable[[], None],
    ) -> None:  # fmt: skip
        self.floating, self.rest = floating, rest
        super().__init__(model, example)

    def _remember(self) -> None:
        self.answers = self._outputs()

    def notes(self, difference: float | None) -> list[str]:
        return ["the model is sharded: masked and shrunk were compared with quantized weights, but float activations"]

    def _difference(self) -> float | None:
        answers = self._outputs()
        return comm.on_rank0(lambda: verify(self.answers, answers))

    def _outputs(self) -> list[Any]:
        noise = tree_map(_like, _noise(self.example), self.example)
        with self.floating():
            found = [_on_cpu(answer(self.model, call)) for call in (self.example, noise)]
        self.rest()
        return found


def folded_difference(simulated: Any, folded: Any) -> float:
    """max|folded - simulated| / max|simulated| of the answers to one call. Local. Raises RuntimeError where it is too
    large to ship."""
    difference = verify(simulated, folded)
    if not difference <= FOLD_TOLERANCE:
        raise RuntimeError(
            f"simulated and folded model differ by {difference:.3g} (relative), more than {FOLD_TOLERANCE:g}: "
            "nothing is exported. The statistics of a BatchNorm are extreme; train on or exclude its layer."
        )
    return difference


def answer(model: nn.Module, call: Call) -> Any:
    """In evaluation mode. Local; the model stays as it is."""
    args, kwargs = call
    with untouched(model):
        return model(*args, **kwargs)


def outputs(model: nn.Module, example: Call) -> list[Any]:
    """What the model answers to the example and to noise like it, in float64, on the CPU. Local; the model stays as it
    is. Raises what a model raises that does not run in float64."""
    with _in_float64(model):
        return [_on_cpu(answer(model, call)) for call in (_double(example), _noise(example))]


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """Other tensors stand in the place of the model's: one that changes its type loses what hangs on it, such as the
    hooks of DistributedDataParallel."""
    held: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    twins: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for places in (module._parameters, module._buffers):
            for name, tensor in places.items():
                if tensor is not None and tensor.is_floating_point():
                    held.append((places, name, tensor))  # type: ignore[arg-type]
    try:
        for places, name, tensor in held:
            if id(tensor) not in twins:
                twin = tensor.detach().double()
                twins[id(tensor)] = nn.Parameter(twin, False) if isinstance(tensor, nn.Parameter) else twin
            places[name] = twins[id(tensor)]
        yield
    finally:
        for places, name, tensor in held:
            places[name] = tensor


def _double(nest: Any) -> Any:
    return _map(nest, lambda t: t.double())


def _noise(nest: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return _map(nest, lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device))


def _like(leaf: Any, other: Any) -> Any:
    """In the dtype of another tensor."""
    return leaf.to(other.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _on_cpu(nest: Any) -> Any:
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, nest)


def _map(nest: Any, fn: Any) -> Any:
    """`fn` of every floating point tensor."""
    return tree_map(lambda t: fn(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, nest)
