"""Which sets of units are heard together, and by whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from dist_compress.pruning.activations import Activations
from dist_compress.pruning.gates import Gates
from dist_compress.pruning.hearing import Hearing
from dist_compress.pruning.listener import UnitListener
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.outputs import Outputs
from dist_compress.pruning.units import UnitSet

_FROM_START = "_from_start"  # of methods that accumulate


def heard_together(sets: Sequence[UnitSet], metrics: Mapping[str, Metric]) -> dict[str, list[int]]:
    """Numbers of the sets that are driven by data, by what is heard and whether it is from the start."""
    found: dict[str, list[int]] = {}
    for i, s in enumerate(sets):
        metric = metrics[s.targets[0]]
        if s.activations:
            found.setdefault("activations", []).append(i)
        elif metric.data_driven:
            found.setdefault(metric.hears + _FROM_START * metric.accumulates, []).append(i)
    return found


def unit_listeners(
    model: nn.Module, activations: Activations, sets: Sequence[UnitSet], metrics: Mapping[str, Metric], num_micro: int
) -> dict[str, UnitListener]:
    """A listener for each key of `heard_together`. Puts hooks on the model. `metrics`: by target."""
    kinds: dict[str, Callable[..., UnitListener]] = {
        "gates": Gates,
        "outputs": Outputs,
        "activations": partial(Hearing, activations),
    }
    found = {}
    for heard, mine in sorted(heard_together(sets, metrics).items()):
        own = [metrics[sets[i].targets[0]] for i in mine]
        found[heard] = kinds[heard.removesuffix(_FROM_START)](model, [sets[i] for i in mine], own, num_micro)
    return found
