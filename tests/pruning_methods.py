"""Every file of pruning/methods, and a config list of all that its method can score in `pruning_nets.Net`."""

import pkgutil

from dist_compress.pruning import methods
from dist_compress.pruning.metric import build_metric

METHODS = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
OPTIONS = {"rigl": {"every": 1, "until": 1.0}}  # where the usual ones are for long runs


def entries(method):
    """What the method can score: coupled channels, channels of a bare layer, single weights, patterns, activations."""
    metric = build_metric(method, OPTIONS.get(method, {}), "pruning")
    found = []
    if not metric.missing(blocks=False):
        found += [{"op_names": ["stem", "b"]}, {"op_names": ["a"]}] if method == "slim" else [{"op_types": ["Conv2d"]}]
        found = [{**entry, "granularity": "out_channel"} for entry in found]
    if not metric.missing(blocks=True):
        found.append({"op_names": ["a", "head"], "granularity": "element"})
        kind = {"granularity": "element"} if metric.regrows else {"granularity": "2:4", "sparse_ratio": None}
        found.append({"op_names": ["free"], **kind})
    if metric.hears_activations():
        found.append({"op_names": ["bn_a"], "target_names": ["_output_0"], "granularity": "per_channel"})
        found.append({"op_names": ["a"], "target_names": ["_input_0"], "granularity": [4, 2, 2]})
    return found
