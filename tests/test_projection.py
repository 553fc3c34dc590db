"""The projection: latents survive, keys keep their order, momentum of masked weights dies."""

import pytest
import torch
from torch import nn

from dist_compress.projection import Masked, Projection


def linear(weights: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
    return layer


def test_mask_comes_before_quant_whoever_was_first():
    layer = linear([1.4, 2.6])
    projection = Projection(layer)
    projection.add("weight", "quant", lambda w: (w + 1).round())
    projection.add("weight", "mask", lambda w: w * torch.tensor([[0.0, 1.0]]))
    projection.project()
    assert layer.weight.tolist() == [[1.0, 4.0]]  # mask first: round(0 + 1), round(2.6 + 1)


def test_project_and_restore_are_idempotent_and_in_place():
    layer = linear([1.0, 2.0])
    before = layer.weight.data_ptr()
    projection = Projection(layer)
    projection.add("weight", "quant", lambda w: w * 0.5)
    projection.project()
    projection.project()
    assert layer.weight.tolist() == [[0.5, 1.0]]
    assert projection.latent("weight").tolist() == [[1.0, 2.0]]
    projection.restore()
    projection.restore()
    assert layer.weight.tolist() == [[1.0, 2.0]]
    assert layer.weight.data_ptr() == before and layer.weight.requires_grad


def test_lifted_shows_the_latent_and_goes_back_also_after_an_error():
    layer = linear([1.0, 2.0])
    projection = Projection(layer)
    projection.add("weight", "mask", lambda w: w * 0)
    projection.project()
    with projection.lifted():
        assert layer.weight.tolist() == [[1.0, 2.0]]
    assert layer.weight.tolist() == [[0.0, 0.0]]
    with pytest.raises(RuntimeError), projection.lifted():
        raise RuntimeError
    assert layer.weight.tolist() == [[0.0, 0.0]]
    with Projection(layer).lifted():
        assert layer.weight.tolist() == [[0.0, 0.0]]


def test_masked_gradient_lets_momentum_die_and_keeps_the_rest():
    layer = linear([1.0, 1.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5)
    projection = Projection(layer)

    def step() -> None:
        layer.weight.grad = torch.ones(1, 2)
        projection.edit_gradients()
        projection.restore()
        optimizer.step()
        projection.project()

    step()
    mask = torch.tensor([[False, True]])
    projection.add("weight", "mask", lambda w: w * mask)
    projection.mask_grad("weight", mask)
    for _ in range(30):
        step()
    momentum = optimizer.state[layer.weight]["momentum_buffer"][0]
    assert momentum[0] < 1e-8 and momentum[1] == pytest.approx(2.0)
    assert layer.weight[0, 0] == 0 and projection.latent("weight")[0, 0] == pytest.approx(0.8)
    projection.mask_grad("weight", None)
    layer.weight.grad = torch.ones(1, 2)
    projection.edit_gradients()
    assert layer.weight.grad.tolist() == [[1.0, 1.0]]


def test_finish_leaves_the_compressed_weights():
    layer = linear([1.0, 2.0])
    projection = Projection(layer)
    projection.add("weight", "mask", lambda w: w * torch.tensor([[0.0, 1.0]]))
    projection.finish()
    assert layer.weight.tolist() == [[0.0, 2.0]]
    projection.restore()
    assert layer.weight.tolist() == [[0.0, 2.0]]


def test_remove_gives_the_latent_back():
    layer = linear([1.0, 2.0])
    projection = Projection(layer)
    projection.add("weight", "mask", lambda w: w * 0)
    projection.project()
    projection.remove("weight", "mask")
    assert layer.weight.tolist() == [[1.0, 2.0]]
    projection.restore()
    projection.project()
    assert layer.weight.tolist() == [[1.0, 2.0]]


def test_tied_parameters_are_projected_once():
    model = nn.ModuleDict({"a": linear([1.0, 2.0]), "b": linear([0.0, 0.0])})
    model["b"].weight = model["a"].weight
    projection = Projection(model)
    projection.add("b.weight", "quant", lambda w: w * 0.5)
    projection.add("a.weight", "quant", lambda w: w * 0.5)
    projection.project()
    assert model["a"].weight.tolist() == [[0.5, 1.0]]
    assert projection.latent("b.weight").tolist() == [[1.0, 2.0]]


def test_a_parameter_shrunk_in_between_gets_a_latent_of_its_new_size():
    layer = linear([1.0, 2.0])
    projection = Projection(layer)
    projection.add("weight", "quant", lambda w: w * 0.5)
    projection.project()
    projection.restore()
    layer.weight = nn.Parameter(layer.weight.detach()[:, :1])
    projection.project()
    assert layer.weight.tolist() == [[0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_is_masked_fill_bit_for_bit_whatever_stands_there(dtype):
    values = torch.tensor([-1.5, 0.0, -0.0, torch.nan, torch.inf, 3.0], dtype=dtype).repeat(4, 1)
    keep = torch.rand(4, 6) > 0.5
    for latent in (values, values.t().contiguous().t()):
        kept = Masked(keep)(latent)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[latent.element_size()]
        assert torch.equal(kept.view(bits), latent.masked_fill(~keep, 0).view(bits)) and latent.isnan().any()
    rows = torch.tensor([[True], [False], [True], [False]])
    assert torch.equal(Masked(rows)(values).view(bits), values.masked_fill(~rows, 0).view(bits))
