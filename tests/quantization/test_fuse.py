"""Folding: what is found, the arithmetic against the unfolded net, and errors of `fuse_names`."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, attached, calibrated, net
from torch import nn

from dist_compress.errors import UserError
from dist_compress.quantization.fuse import Fold, Folded, Fused, find, fold
from dist_compress.sites import Sites


def statistics(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * 0.5
                tensor.copy_(values.abs() + 0.2 if name.endswith("running_var") else values)
    return model.eval()


def test_what_follows_a_layer_is_found_through_the_trace():
    model = net()
    found = find(Sites(model, (EXAMPLE,)), ["conv1", "conv2", "linear"], [])
    assert found == [Fused("conv1", "bn1", "relu"), Fused("conv2", "bn2")]


def test_a_layer_read_by_others_or_called_twice_is_left_alone():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.na, self.nb, self.nc = (nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            x = self.na(x) + x  # read twice
            x = self.nb(self.b(self.nb(x)))  # called twice
            return self.nc(torch.relu(self.c(x)))  # not adjacent

    assert find(Sites(Shared(), (EXAMPLE,)), ["a", "b", "c"], []) == []


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 3, 6, 6)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (2, 4, 6, 6)),
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), (2, 3, 5, 5)),
        (nn.Linear(5, 7), nn.BatchNorm1d(7), (4, 5)),
    ],
)
def test_the_folded_layer_is_layer_and_norm(layer, norm, shape):
    model = statistics(nn.Sequential(layer, norm))
    x = torch.randn(shape)
    assert find(Sites(model, (x,)), ["0"], []) == [Fused("0", "1")]
    before, folding = model(x), Fold(model[0], model[1])
    weight = folding.into(model[0].weight.detach())
    torch.testing.assert_close(folding.out_of(weight), model[0].weight.detach(), atol=1e-6, rtol=1e-5)
    fold(model, Fused("0", "1"), weight)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)
    assert isinstance(model[1], Folded)


def test_the_gradient_is_that_of_the_statistics_that_were_projected():
    """Those of the norm move on between the forward pass and the optimizer step."""
    model = net()
    weights = calibrated(model, method="lsq").weights
    grad, scale = torch.randn(model.conv1.weight.shape), weights.quantizers["conv1.weight"].scale

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        model.conv1.weight.grad = grad.clone()
        weights.gradients()
        return model.conv1.weight.grad, scale.grad

    wanted = gradients()
    model.bn1.running_var.mul_(9)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))
    weights.look_at_norms()
    assert not torch.equal(gradients()[1], wanted[1])


def test_a_gamma_of_zero_is_no_division_by_zero():
    model = net()
    with torch.no_grad():
        model.bn1.weight[2] = 0.0
    calibrated(model, method="qat")
    assert model.conv1.weight.isfinite().all() and not model.conv1.weight[2].any()


def test_batchnorm_over_tokens_is_not_folded():
    model = statistics(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)))
    assert find(Sites(model, (torch.randn(2, 7, 5),)), ["0"], []) == []


def test_the_folded_net_is_the_simulated_one():
    model = net()
    quantizer = calibrated(model, method="qat")
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), quantizer.observed.floating():
        simulated = model(x)
        quantizer.fold()
        torch.testing.assert_close(model(x), simulated, atol=1e-5, rtol=1e-5)
    assert [type(m) for m in (model.bn1, model.bn2)] == [Folded, Folded]
    for name in ("conv1", "conv2", "linear"):
        module = model.get_submodule(name)
        level = module.weight / module.quantizer_weight.scale
        torch.testing.assert_close(level, level.round(), atol=1e-4, rtol=0)
        assert 126.9 < level.abs().max() < 127.1


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["conv1", "bn2"], "bn2 does not follow conv1"),
        (["conv1", "relu"], "relu does not follow conv1"),
        (["bn1", "relu"], "bn1 must come first"),
        (["conv1", "bn9"], "no module 'bn9'"),
    ],
)
def test_fuse_names_that_are_not_adjacent(names, said):
    with pytest.raises(UserError, match=said):
        attached(net(), method="qat", config_list=[{"op_types": ["Conv2d"], "fuse_names": [names]}])


def test_fuse_names_that_are():
    entry = {"op_types": ["Conv2d"], "fuse_names": [["conv1", "bn1", "relu"]]}
    assert attached(net(), method="qat", config_list=[entry]).fused["conv1"] == Fused("conv1", "bn1", "relu")


def test_the_output_of_a_fused_layer_is_that_of_the_last():
    model = net()
    entry = {"op_types": ["Conv2d"], "target_names": ["weight", "_output_0"]}
    quantizer = calibrated(model, method="qat", config_list=[entry])
    assert quantizer.activations["conv1._output_0"].place == ("relu", "_output_0")
    assert quantizer.activations["conv2._output_0"].place == ("bn2", "_output_0")
    with torch.no_grad():
        before = model.eval()(EXAMPLE)
        quantizer.fold()
        torch.testing.assert_close(model(EXAMPLE), before, atol=0.05, rtol=0.05)
        model.bn2.quantizer_output_0.scale.mul_(100)  # still in the flow behind the folded norm
        assert not torch.allclose(model(EXAMPLE), before, atol=0.05, rtol=0.05)


def test_a_norm_that_is_folded_is_no_target():
    with pytest.raises(UserError, match="bn1.weight is folded into conv1"):
        attached(net(), method="qat", config_list=[
            {"op_types": ["Conv2d"]}, {"op_names": ["bn1"], "target_names": ["weight"]},
        ])  # fmt: skip
