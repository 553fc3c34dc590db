"""Methods that change weights by what layers are called with, before anything is quantized.

Each of them has rounds of calibration of its own, with the same data: the model is heard as it is, its weights change,
and what comes next hears the model with these. First layers are rescaled (rescaling.py), then weights are solved for
(solving.py), and at last the ranges of activations are observed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.linear_form import has_linear_form
from dist_compress.method import Context
from dist_compress.quantization import channels
from dist_compress.quantization.channels import Graph
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.fuse import Fold
from dist_compress.quantization.heard import Heard
from dist_compress.quantization.layer import Layer
from dist_compress.quantization.rescaling import Rescales, Rescaling
from dist_compress.quantization.solving import Solves, Solving
from dist_compress.sites import Sites


def check(model: nn.Module, parameters: Mapping[str, FakeQuantize]) -> None:
    """Raise UserError for a parameter that its method cannot solve for. Local, the same on every rank."""
    for path, quantizer in parameters.items():
        module, target = quantizer.place
        if isinstance(quantizer, Solves) and not (target == "weight" and has_linear_form(model.get_submodule(module))):
            kind, name = type(model.get_submodule(module)).__name__, type(quantizer).__module__.rpartition(".")[2]
            raise UserError(
                f"quantization.config_list: {path} has the method {name}, which solves for the weights of Linear, "
                f"Conv1d, Conv2d, Conv3d and Conv1D; this is the {target} of a {kind}. Choose ptq for it."
            )


def graph(sites: Sites, quantizers: Iterable[FakeQuantize]) -> Graph | None:
    """What methods that change weights have to know of a model, while a rank has all of it; None: there are none.
    Collective. Raises UserError."""
    if not any(isinstance(quantizer, Rescales | Solves) for quantizer in quantizers):
        return None
    return comm.on_rank0(lambda: channels.find(sites))


def rounds(
    context: Context, quantizers: Iterable[FakeQuantize], graph: Graph | None, norms: Mapping[str, Fold],
    notes: list[str],
) -> Iterator[Heard]:  # fmt: skip
    """Listeners for the calibration; what one hears changes weights before the next is given out. `norms`: by the layer
    that they will be folded into. `notes` gets lines for the user. Every step is collective. Raises UserError on every
    rank."""
    rescaled: dict[type[FakeQuantize], dict[str, Layer]] = {}
    solved: list[Layer] = []
    for quantizer in quantizers:
        where, target = quantizer.place
        if isinstance(quantizer, Rescales) and target in ("weight", "_input_0") and _has_weight(context.model, where):
            own = rescaled.setdefault(type(quantizer), {})
            if where not in own or target == "weight":
                own[where] = _layer(context, quantizer, norms.get(where))
        elif isinstance(quantizer, Solves):
            solved.append(_layer(context, quantizer, norms.get(where)))
    if graph is None or not rescaled and not solved:
        return
    for layers in rescaled.values():
        rescaling = Rescaling(context, list(layers.values()), graph.folds)
        notes.extend(rescaling.notes())
        if rescaling.views:
            yield rescaling
            rescaling.finish()
        else:
            rescaling.close()
    if solved:
        solving = Solving(context, solved, graph.sources)
        yield solving
        solving.finish()


def _has_weight(model: nn.Module, name: str) -> bool:
    module = dict(model.named_modules()).get(name)
    return module is not None and has_linear_form(module)


def _layer(context: Context, quantizer: FakeQuantize, fold: Fold | None) -> Layer:
    name = quantizer.place[0]
    return Layer(name, context.model.get_submodule(name), quantizer, context.projection, fold)
