"""Methods that change weights by what layers are called with, before anything is quantized.

Each of them has rounds of calibration of its own, with the same data: the model is heard as it is, its weights change,
and what comes next hears the model with these. First layers are rescaled (rescaling.py), then weights are solved for
(solving.py), and at last the ranges of activations are observed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.linear_form import has_linear_form
from dist_compress.method import Context
from dist_compress.quantization import channels
from dist_compress.quantization.fake_quant import FakeQuantize
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


def rounds(context: Context, layers: Sequence[Layer], notes: list[str]) -> Iterator[Heard]:
    """Listeners for the calibration; what one hears changes weights before the next is given out. `notes` gets lines
    for the user. Every step is collective. Raises UserError on every rank."""
    rescaled = [layer for layer in layers if isinstance(layer.quantizer, Rescales)]
    solved = [layer for layer in layers if isinstance(layer.quantizer, Solves)]
    if not rescaled and not solved:
        return
    assert context.example is not None
    sites = Sites(context.model, *context.example)
    graph = comm.on_rank0(lambda: channels.find(sites))
    for kind in dict.fromkeys(type(layer.quantizer) for layer in rescaled):
        own = [layer for layer in rescaled if type(layer.quantizer) is kind]
        rescaling = Rescaling(context, own, graph.folds)
        notes.extend(rescaling.notes())
        if rescaling.views:
            yield rescaling
            rescaling.finish()
    if solved:
        solving = Solving(context, solved, graph.sources)
        yield solving
        solving.finish()
