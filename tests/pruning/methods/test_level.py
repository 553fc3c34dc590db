"""Magnitude of single weights, by hand-computed values."""

import pytest
import torch
from pruning_nets import attach, config
from torch import nn

from dist_compress.target import Coupling


def kept(weight, **entry):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    cfg = config([{"op_names": ["lin"], **entry}], method="level")
    pruner, _, _ = attach(cfg, nn.ModuleDict({"lin": layer}), Coupling())
    pruner.after_step(-1)
    return pruner.masks()["lin.weight"].expand(weight.shape).int().tolist()


WEIGHT = torch.tensor([[0.5, -3.0, 0.1, 2.0], [-0.2, 0.4, -0.3, -6.0]])


@pytest.mark.parametrize(
    ("entry", "mask"),
    [
        ({}, [[1, 1, 0, 1], [0, 0, 0, 1]]),  # by default single weights
        ({"sparse_ratio": 0.875}, [[0, 0, 0, 0], [0, 0, 0, 1]]),
        ({"granularity": "2:4"}, [[0, 1, 0, 1], [0, 1, 0, 1]]),
        ({"granularity": [1, 2]}, [[1, 1, 0, 0], [0, 0, 1, 1]]),  # sums 3.5, 2.1, 0.6, 6.3
        ({"granularity": "out_channel", "dependency_group_id": None}, [[0, 0, 0, 0], [1, 1, 1, 1]]),  # 5.6, 6.9
    ],
)
def test_the_smallest_magnitudes_go(entry, mask):
    assert kept(WEIGHT, **entry) == mask
