"""Which sets of units are heard together, and by whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.activations import Activations
from dist_compress.pruning.gates import Gates
from dist_compress.pruning.hearing import Hearing
from dist_compress.pruning.listener import UnitListener
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.outputs import Outputs
from dist_compress.pruning.units import UnitSet
from dist_compress.schema import TrainConfig

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


def refuse_compiled(train: TrainConfig, sets: Sequence[UnitSet], metrics: Mapping[str, Metric]) -> None:
    """Raise UserError for what can hear nothing in a graph of `train.compile`: gradients on their way through it."""
    for heard, mine in heard_together(sets, metrics).items() if train.compile else ():
        for unit_set in (sets[i] for i in mine):
            if metrics[unit_set.targets[0]].wants_gradients and not heard.startswith("gates"):
                raise UserError(
                    f"{unit_set.name}: {unit_set.setting.said_by('method')} scores by the gradient of an activation, "
                    "which train.compile=true leaves inside of its graph. Choose a method without (mean_activation, "
                    "apoz; taylor on weights), or set train.compile=false."
                )


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
