"""Mask, plan, apply and compare, in float32 and in float64, on new inputs of two batch sizes."""

import copy

import pytest
import torch
from torch import nn

from dist_compress import speedup
from dist_compress.speedup import apply, verify

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


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


def _cast(inputs, dtype):
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


@pytest.fixture
def randomise():
    return _randomise


@pytest.fixture
def shrink():
    """shrink(model, inputs, slices) -> (small model, plan) in float32; the model it is given ends masked.

    inputs: an example tensor with the batch first, or a function of the batch size that returns a tensor or the tuple
    of arguments. A plan is made at batch 1, for each dtype, and what it shrinks is compared at batch 1 and 3.
    """

    def run(model, inputs, slices, **settings):
        torch.manual_seed(0)
        make = inputs if callable(inputs) else lambda batch: torch.randn(batch, *inputs.shape[1:])
        _zero(_randomise(model), slices)
        plans = []
        for dtype, tolerance in TOLERANCES.items():
            masked = copy.deepcopy(model).to(dtype)
            plan = speedup.plan(masked, _cast(make(1), dtype), **settings)
            small = apply(copy.deepcopy(masked), plan)
            for batch in (1, 3):
                new = _cast(make(batch), dtype)
                with torch.no_grad():
                    assert verify(masked(*copy.deepcopy(new)), small(*new)) <= tolerance
            plans.append(plan)
        kept = [{(f, d): i.tolist() for f, dims in p.keep.items() for d, i in dims.items()} for p in plans]
        assert kept[0] == kept[1], "the plan depends on the dtype"
        return small, plan

    return run
