"""Masked and shrunk, quantized: what is compared, and what is not taken for an answer."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, calibrated, net
from torch import nn

from dist_compress.quantization.agreement import Agreement

CALL = ((EXAMPLE,), {})


class Halved(nn.Module):
    """Makes tensors of a type of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.float())


def test_a_model_agrees_with_itself_and_not_with_another():
    model = net()
    calibrated(model, method="ptq")
    agreement = Agreement(model, CALL)
    assert agreement.check(1e-5) == 0.0
    with torch.no_grad():
        model.linear.weight[0] += 0.1
    with pytest.raises(RuntimeError, match=r"differ by .* when they are quantized.*speedup.tolerance=1e-05"):
        agreement.check(1e-5)
    assert agreement.check(None) > 1e-3  # told, not held against it


def test_the_parameters_have_their_type_again():
    model = net()
    Agreement(model, CALL)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_that_does_not_run_in_float64_is_not_compared():
    assert Agreement(Halved(), CALL).check(1e-5) is None


def test_a_shrunk_model_that_does_not_run_is_no_answer():
    model = net()
    agreement = Agreement(model, CALL)
    model.linear = nn.Linear(5, 4)  # badly cut
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        agreement.check(1e-5)
