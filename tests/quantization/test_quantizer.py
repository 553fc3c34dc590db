"""The quantizer in the loop: the same scales on any number of ranks, collectives counted, checkpoints, bad data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # also in the workers of the pool
from nets import EXAMPLE, attached, calibrated, net  # noqa: E402

from dist_compress import comm  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402
from dist_compress.quantization.quantizer import Quantizer  # noqa: E402

MICROS = 6


def micro(step: int, j: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + j)
    return torch.randn(2, 3, 8, 8, generator=generator) * (1 + step)


def trained(quantizer: Quantizer, steps: range) -> list[str]:
    """Forward passes of training without an optimizer: what the observers see. The fingerprint after each step."""
    model = quantizer.context.model.train()
    for norm in (model.bn1, model.bn2):
        norm.momentum = 0.0  # the loop keeps their statistics; they are not this test's
    marks = []
    for step in steps:
        own = range(comm.rank(), MICROS, comm.world_size())
        for j in own:
            model(micro(step, j))
            quantizer.after_backward(step, j)
        if len(own) * comm.world_size() < MICROS + comm.world_size() - 1 and not MICROS % comm.world_size() == 0:
            model(micro(0, 0) * 1e3)  # the dummy of a rank without a micro-batch
        quantizer.after_step(step)
        quantizer.context.projection.restore()
        quantizer.context.projection.project()
        marks.append(quantizer.fingerprint())
    return marks


def whole(method: str) -> tuple[list[str], dict[str, int]]:
    quantizer = attached(net(), num_micro=MICROS, method=method)
    quantizer.observed.calibrating = True
    with torch.no_grad():
        for step in range(2):
            for j in range(comm.rank(), MICROS, comm.world_size()):
                quantizer.context.model.eval()(micro(step, j))
                quantizer.observed.count_pass()
            quantizer.observed.end_step()
    quantizer.observed.calibrating = False
    quantizer.begin()
    comm.calls.clear()
    marks = [quantizer.fingerprint(), *trained(quantizer, range(3))]
    return marks, dict(comm.calls)


@pytest.mark.parametrize("method", ["ptq", "qat", "lsq"])
def test_scales_are_the_same_on_any_number_of_ranks(ranks, method):
    one, _ = ranks(1, whole, method)[0]
    assert len(set(one)) == (4 if method == "qat" else 1)  # only there the ranges move without an optimizer
    for n in (2, 3, 4):
        for marks, calls in ranks(n, whole, method):
            assert marks == one
            assert calls.get("all_reduce", 0) == (6 if method == "qat" else 0)  # two a step, or no observers


def test_a_resumed_quantizer_goes_on_with_the_same_bits():
    first, other = calibrated(net(), method="qat"), attached(net(), method="qat")
    trained(first, range(2))
    with first.context.projection.lifted():
        weights = {name: tensor.clone() for name, tensor in first.context.model.state_dict().items()}
    state = first.state_dict()
    wanted = trained(first, range(2, 4))
    other.context.projection.restore()
    other.context.model.load_state_dict(weights)
    other.load_state_dict(state)
    other.context.projection.project()
    assert trained(other, range(2, 4)) == wanted


def nothing_seen() -> str:
    quantizer = attached(net(), method="qat")
    quantizer.observed.end_step()
    try:
        quantizer.begin()
    except UserError as error:
        return str(error)
    return ""


def not_a_number() -> str:
    quantizer = attached(net(), method="qat")
    quantizer.observed.calibrating = True
    with torch.no_grad():
        x = micro(0, comm.rank())
        if comm.rank() == 0:
            x[0, 0, 0, 0] = float("nan")
        quantizer.context.model.eval()(x)
        quantizer.observed.count_pass()
        quantizer.observed.end_step()
    try:
        quantizer.begin()
    except UserError as error:
        return str(error)
    return ""


def test_bad_calibration_data_is_an_error_on_all_ranks(ranks):
    assert all("no calibration data reached it" in text for text in ranks(2, nothing_seen))
    said = ranks(2, not_a_number)
    assert said[0] == said[1] and "conv1._input_0: 1 of 768 values are NaN or infinite" in said[0]


def test_nan_in_training_is_counted_and_changes_no_scale():
    quantizer = calibrated(net(), method="qat")
    model, before = quantizer.context.model.train(), quantizer.activations["conv1._input_0"].scale.clone()
    model(torch.full_like(EXAMPLE, float("nan")))
    quantizer.after_backward(0, 0)
    quantizer.after_step(0)
    assert torch.equal(quantizer.activations["conv1._input_0"].scale, before)
    assert quantizer.metrics()["quantization/num_not_finite"] >= EXAMPLE.numel()


def test_the_table_says_what_was_lost():
    entry = {"op_types": ["Linear"], "target_settings": {"weight": {"quant_dtype": "int3"}}}
    quantizer = calibrated(net(), method="ptq", config_list=[entry])
    quantizer.measure((EXAMPLE,), {})
    rows = {(row["module"], row["target"]): row for row in quantizer.results()["quantization"]}
    assert rows["linear", "_input_0"]["sqnr_db"] > 30 > rows["linear", "weight"]["sqnr_db"] > 5
    weight = quantizer.context.projection.latent("linear.weight")
    assert rows["linear", "weight"]["low"] == weight.min().item()
    assert rows["linear", "weight"]["quant_dtype"] == "int3"


def test_autocast_keeps_its_dtype():
    model = net()
    calibrated(model, method="qat")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.eval()(EXAMPLE).dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_float_net(frozen):
    """Weights of 16 bits, so that rounding is seen by nobody; norms that are folded live or have fixed statistics."""
    model, plain = net(), net()
    entry = {"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int16"}
    quantizer = calibrated(model, method="qat", config_list=[entry])
    quantizer.freeze = 0 if frozen else 100
    quantizer.context.projection.project()
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    for each in (model.train(), plain.train()):
        for norm in (each.bn1, each.bn2):
            norm.momentum = 0.0
            if each is plain:
                norm.training = not frozen
        each(x).square().sum().backward()
    quantizer.before_step(0)
    for name, parameter in plain.named_parameters():
        if frozen or name != "conv2.bias":  # a norm with the statistics of the batch takes it away
            wanted = parameter.grad
            torch.testing.assert_close(model.get_parameter(name).grad, wanted, rtol=0, atol=1e-3 * wanted.abs().max())
