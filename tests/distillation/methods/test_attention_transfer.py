"""Attention maps: by hand, and blind to width and scale."""

import pytest
import torch
from distillation_nets import attach, hidden, losses

from dist_compress.distillation.methods.attention_transfer import attention
from dist_compress.errors import UserError


def test_maps_by_hand():
    x = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # [1, 2 channels, 1, 2]
    assert torch.allclose(attention(x), torch.tensor([[9.0, 4.0]]) / 97**0.5)
    assert torch.allclose(attention(5 * x), attention(x))
    tokens = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])  # [1, 2 tokens, 2]
    assert torch.allclose(attention(tokens), torch.tensor([[9.0, 4.0]]) / 97**0.5)


def test_the_loss_needs_no_equal_widths():
    distiller, student, teacher = attach([{"op_names": ["layer1"]}], method="attention_transfer")
    right = (attention(hidden(student, "layer1")) - attention(hidden(teacher, "layer1"))).square().sum()
    [found] = losses(distiller, student).values()
    assert float(found) == pytest.approx(float(right), rel=1e-5) and float(found) > 0


def test_nothing_to_attend_to():
    distiller, student, _ = attach([{"op_names": ["head"]}], method="attention_transfer")
    with pytest.raises(UserError, match=r"head._output_0 is \[8, 10\]: no positions"):
        losses(distiller, student)
