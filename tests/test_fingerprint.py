"""The fingerprint of weights tells every change apart, and nothing that is no change."""

from __future__ import annotations

import torch
from torch import nn

from dist_compress.fingerprint import tensor_fingerprints, weights_fingerprint


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))


def test_equal_bits_have_equal_fingerprints_in_any_memory_format():
    assert weights_fingerprint(model()) == weights_fingerprint(model().to(memory_format=torch.channels_last))


def test_every_bit_counts():
    changed = model()
    with torch.no_grad():
        changed[1].running_var[3] = torch.nextafter(changed[1].running_var[3], torch.tensor(9.0))  # type: ignore
    before, after = (tensor_fingerprints(m.state_dict()) for m in (model(), changed))
    assert [name for name in before if before[name] != after[name]] == ["1.running_var"]
    assert weights_fingerprint(changed) != weights_fingerprint(model())


def test_two_layers_of_one_shape_cannot_change_places_unseen():
    swapped = model()
    swapped[2].weight, swapped[3].weight = swapped[3].weight, swapped[2].weight
    assert weights_fingerprint(swapped) != weights_fingerprint(model())
