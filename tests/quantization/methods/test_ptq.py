"""Post-training quantization: ranges from observers, nothing in training, options."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, calibrated, net

from dist_compress.errors import UserError
from dist_compress.quantization.affine import fake_quantize, qparams


def test_min_max_is_the_extent_of_what_was_seen():
    model = net()
    quantizer = calibrated(model, method="ptq", options={"observer": "min_max", "weight_observer": "min_max"})
    generator = torch.Generator().manual_seed(7)
    x = torch.cat([torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2)])
    wanted = qparams(x.min(), x.max(), quantizer.activations["conv1._input_0"].spec.dtype, "affine")
    found = quantizer.activations["conv1._input_0"]
    assert found.scale.item() == wanted[0].item() and found.zero_point.item() == wanted[1].item()


def test_observers_differ_and_mse_has_the_smallest_error():
    errors = {}
    for observer in ("min_max", "percentile", "mse", "entropy"):
        model = net()
        quantizer = calibrated(
            model, method="ptq", options={"observer": observer, "percentile": 0.99},
            config_list=[{"op_types": ["Conv2d"], "quant_dtype": "int4", "quant_scheme": "symmetric"}],
        )  # fmt: skip
        q = quantizer.activations["conv1._input_0"]
        x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        errors[observer] = float((x - fake_quantize(x, q.scale, q.zero_point, q.spec.dtype)).square().mean())
    assert min(errors, key=errors.get) == "mse" and len(set(errors.values())) >= 3


def test_gradients_pass_clipping():
    model = net()
    quantizer = calibrated(model, method="ptq")
    x = (EXAMPLE * 10).requires_grad_()  # most of it is clipped
    quantizer.activations["conv1._input_0"](x).sum().backward()
    assert bool((x.grad == 1).all())


@pytest.mark.parametrize(
    "options", [{"observer": "max"}, {"weight_observer": "entropy"}, {"percentile": 0.3}, {"percentil": 0.9}]
)
def test_bad_options(options):
    with pytest.raises(UserError, match="quantization.options"):
        calibrated(net(), method="ptq", options=options)
