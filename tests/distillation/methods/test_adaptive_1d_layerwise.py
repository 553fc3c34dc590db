"""Channels stretched to the teacher's width."""

import pytest
import torch
from distillation_nets import attach, hidden, losses

from dist_compress.distillation.methods.adaptive_1d_layerwise import stretched


def test_stretching_by_hand():
    row = torch.tensor([[0.0, 2.0, 6.0]])
    assert stretched(row, 5).tolist() == [[0.0, 1.0, 2.0, 4.0, 6.0]]
    assert stretched(row, 2).tolist() == [[0.0, 6.0]] and stretched(row, 3) is row
    image = row.view(1, 3, 1, 1).expand(2, 3, 2, 2)
    assert stretched(image, 5).shape == (2, 5, 2, 2) and stretched(image, 5)[1, :, 0, 1].tolist() == [0, 1, 2, 4, 6]


def test_the_loss():
    distiller, student, teacher = attach([{"op_names": ["layer1"]}], method="adaptive_1d_layerwise")
    own, theirs = hidden(student, "layer1"), hidden(teacher, "layer1")
    right = (stretched(own, 8) - theirs).square().mean((1, 2, 3)).sum()
    [found] = losses(distiller, student).values()
    assert float(found.detach()) == pytest.approx(float(right.detach()), rel=1e-5) and not distiller.translators.shapes
