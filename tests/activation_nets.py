"""Pruners of activations, for tests."""

from __future__ import annotations

import pytest
import torch
from pruning_nets import COUPLING, attach, config

from dist_compress.errors import UserError

LATER = {"name": "one_shot", "start": "1steps", "end": "1steps"}
SOON = {"name": "linear", "start": "1steps", "end": "3steps", "num_decisions": 3}
X = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def start(*entries, model=None, coupling=COUPLING, schedule=LATER, example=None, **keys):
    return attach(config(list(entries), schedule=schedule, **keys), model, coupling, example=example)


def on(module, site="_output_0", **keys):
    return {"op_names": [module], "target_names": [site], **keys}


def held(model, module, site, x):
    """The tensor at a site."""
    seen = []
    module = model.get_submodule(module)
    if site.startswith("_input_"):
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        hook = module.register_forward_hook(lambda _, args, out: seen.append(out))
    model.eval()(x)
    hook.remove()
    return seen[0]


def refuse(*entries, **keys) -> str:
    with pytest.raises(UserError) as error:
        start(*entries, **keys)
    return str(error.value)
