import copy

import pytest
import torch
from torch import nn

from dist_compress import speedup
from dist_compress.speedup import apply, verify


def _randomise(model):
    """Eval mode, and norms with statistics and affines away from (0, 1)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                shape = module.running_mean.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.1)
    return model.eval()


def _zero(model, slices):
    """slices: {param fqn: indices along dim 0} or {param fqn: (dim, indices)}."""
    with torch.no_grad():
        for fqn, where in slices.items():
            dim, index = where if isinstance(where, tuple) else (0, where)
            model.get_parameter(fqn).index_fill_(dim, torch.tensor(index), 0.0)


@pytest.fixture
def randomise():
    return _randomise


@pytest.fixture
def shrink():
    """shrink(model, input, slices) zeroes, plans and applies; returns (small model, plan), checked on new inputs."""

    def run(model, x, slices, tolerance=1e-5, make_input=None):
        torch.manual_seed(0)
        _randomise(model)
        _zero(model, slices)
        plan = speedup.plan(model, (x,))
        small = apply(copy.deepcopy(model), plan)
        for batch in (x.shape[0], x.shape[0] + 2):
            new = make_input(batch) if make_input else torch.randn(batch, *x.shape[1:])
            with torch.no_grad():
                assert verify(model(new), small(new)) <= tolerance
        return small, plan

    return run
