import math

import torch

from dist_compress.speedup import verify


def test_largest_difference_over_largest_value():
    a = {"x": torch.tensor([1.0, -4.0]), "y": [torch.tensor([2.0])]}
    b = {"x": torch.tensor([1.0, -4.0]), "y": [torch.tensor([2.5])]}
    assert verify(a, a) == 0.0
    assert verify(a, b) == 0.125


def test_what_cannot_be_compared_is_infinitely_far():
    x = torch.ones(2)
    assert verify(x, torch.ones(3)) == math.inf
    assert verify(x, [x]) == math.inf
    assert verify(x, torch.tensor([1.0, math.nan])) == math.inf
    assert verify(torch.zeros(2), x) == math.inf
    assert verify(torch.zeros(2), torch.zeros(2)) == 0.0
    assert verify(torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf])) == 0.0
