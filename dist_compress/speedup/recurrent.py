"""Recurrent layers: LSTM, GRU and RNN hold their sizes in integers, one for all layers and directions."""

from __future__ import annotations

from torch import nn

from dist_compress.speedup.keep import Keep
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Ref


def recurrent_sizes(s: Structure, keep: Keep, modules: dict[str, nn.Module]) -> dict[str, int]:
    """{"fqn.hidden_size", "fqn.proj_size" or "fqn.input_size": new value}.

    The initial state of zeros ties layers and directions.
    """
    found = {}
    for key in s.known():
        for fqn in s.trace.info(Ref(key)).all_fqns:
            owner, _, name = fqn.rpartition(".")
            module = modules.get(owner)
            if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
                continue
            sizes = [keep.counts()[var] for var in s.dims(Ref(key))]
            if name == "weight_hr_l0":  # what goes back into the layer is projected
                found |= {f"{owner}.proj_size".lstrip("."): sizes[0], f"{owner}.hidden_size".lstrip("."): sizes[1]}
            elif name in ("weight_hh_l0", "weight_hh") and not getattr(module, "proj_size", 0):
                found[f"{owner}.hidden_size".lstrip(".")] = sizes[1]
            elif name in ("weight_ih_l0", "weight_ih"):
                found[f"{owner}.input_size".lstrip(".")] = sizes[1]
    return {name: n for name, n in found.items() if getattr(modules[name.rpartition(".")[0]], name.split(".")[-1]) != n}
