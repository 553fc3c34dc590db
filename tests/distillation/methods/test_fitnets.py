"""Hidden states through a map that is trained beside the student."""

import pytest
import torch
from distillation_nets import attach, hidden, losses
from torch.nn import functional as F


def test_equal_widths_need_no_map():
    distiller, student, teacher = attach([{"op_names": ["layer2"], "method": "fitnets", "lambda": 0.5}], weight=3.0)
    found = losses(distiller, student)
    right = (hidden(student, "layer2") - hidden(teacher, "layer2")).square().mean((1, 2, 3)).sum()
    assert set(found) == {"fitnets/layer2._output_0_loss"}
    assert float(found["fitnets/layer2._output_0_loss"]) == pytest.approx(1.5 * float(right), rel=1e-5)
    assert not distiller.translators.shapes


def test_another_width_is_reached_by_a_map_that_learns():
    distiller, student, teacher = attach([{"op_names": ["layer1"]}], method="fitnets", translator_lr=0.05)
    assert distiller.translators.shapes == [(8, 4)]
    weight = distiller.translators.weight(0)
    assert float(weight.abs().max()) <= 0.5 and float(weight.std()) > 0.1
    right = F.conv2d(hidden(student, "layer1"), weight[:, :, None, None]) - hidden(teacher, "layer1")
    [first] = losses(distiller, student).values()
    assert float(first) == pytest.approx(float(right.square().mean((1, 2, 3)).sum()), rel=1e-5)
    for _ in range(40):
        distiller.translators.values.grad = None
        [loss] = losses(distiller, student).values()
        loss.backward()
        distiller.after_backward(0, 0)
        distiller.before_step(0)
    assert float(loss) < 0.6 * float(first)
    assert student.layer1.weight.grad is not None and teacher.layer1.weight.grad is None


def test_the_step_is_that_of_adam():
    distiller, student, _ = attach([{"op_names": ["layer1"]}], method="fitnets", translator_lr=0.01)
    translators = distiller.translators
    copy = translators.values.detach().clone().requires_grad_()
    adam = torch.optim.Adam([copy], lr=0.01)
    for step in range(3):
        total = torch.zeros_like(copy)
        for micro in range(5):
            [loss] = losses(distiller, student, n=4 + micro).values()
            loss.backward()
            assert translators.values.grad is not None
            total += translators.values.grad
            distiller.after_backward(step, micro)
        copy.grad = total
        adam.step()
        distiller.before_step(step)
        assert torch.allclose(translators.values, copy, atol=1e-6)
