"""The activations of a run that are quantized: which forward passes their observers hear, and when ranges move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dist_compress.quantization import checks
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.observer import Observer, reduce


class Activations:
    """Their quantizers by their paths; a listener of calibrations. Scales are whole on every rank."""

    def __init__(self, quantizers: Mapping[str, FakeQuantize]) -> None:
        self.quantizers, self.calibrating = quantizers, False

    def observers(self) -> dict[str, Observer]:
        """Of those that have one now."""
        return {path: q.observer for path, q in self.quantizers.items() if q.observer is not None}

    def begin_pass(self, hearing: bool) -> None:
        """A forward pass begins, which is heard or not: what an evaluation or a dummy round left behind is dropped."""
        for quantizer in self.quantizers.values():
            quantizer.hearing = hearing or self.calibrating
            quantizer.measured.clear()

    def count_pass(self) -> None:
        """The forward pass belongs to a live micro-batch: it counts. Local."""
        for quantizer in self.quantizers.values():
            for measured in quantizer.measured:
                assert quantizer.observer is not None
                quantizer.observer.fold(measured)
            quantizer.measured.clear()

    def end_step(self) -> None:
        """All micro-batches of the step were counted. Collective: two collectives, or none without observers."""
        reduce(list(self.observers().values()))

    def begin(self) -> None:
        """The calibration is over. Local, the same on every rank. Raises UserError where nothing finite was seen."""
        for path, quantizer in self.quantizers.items():
            checks.observed(path, quantizer.observer)
            quantizer.begin()

    def before_step(self) -> None:
        """The gradients are reduced. Local, the same on every rank."""
        for quantizer in self.quantizers.values():
            quantizer.before_step()

    def stepped(self, observed: bool) -> None:
        """The optimizer has made a step. `observed`: its ranges become those of the next. Collective, if so."""
        if observed:
            self.end_step()
        for quantizer in self.quantizers.values():
            if observed and quantizer.observer is not None:
                quantizer.follow()
            quantizer.stepped(None)

    @contextmanager
    def floating(self) -> Iterator[None]:
        """Inside, only parameters are quantized: what is left is linear between norms, and can be compared."""
        for quantizer in self.quantizers.values():
            quantizer.enabled = False
        try:
            yield
        finally:
            for quantizer in self.quantizers.values():
                quantizer.enabled = True

    def num_not_finite(self) -> int:
        """Values that were seen so far and left out. Local, the same on every rank."""
        return sum(int(observer.counts[1]) for observer in self.observers().values())

    def state_dict(self) -> dict[str, Any]:
        """Between two steps; the same on every rank."""
        return {path: observer.state_dict() for path, observer in self.observers().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After `begin`: scales of which nothing was saved are learned, or stay."""
        for path, quantizer in self.quantizers.items():
            if path in state and quantizer.observer is not None:
                quantizer.observer.load_state_dict(state[path])
            else:
                quantizer.observer = None
