"""An apply_method of the user's: forward and gradient, for activations and weights, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import EXAMPLE, attached, calibrated, net
from torch import nn
from torch.nn import functional as F

from dist_compress.errors import UserError
from dist_compress.quantization import convert
from dist_compress.quantization.affine import fake_quantize

FILE = """
from dataclasses import dataclass
import torch
from dist_compress.quantization.affine import fake_quantize

@dataclass
class Options:
    by: float = 4.0

def apply(x, scale, zero_point, dtype, options):
    low, high = (dtype.quant_min - zero_point) * scale, (dtype.quant_max - zero_point) * scale
    inside = torch.clamp(x, low, high)
    soft = inside + (x - inside) / options.by
    return soft + (fake_quantize(x, scale, zero_point, dtype) - soft).detach()
"""
HEAD = "from dataclasses import dataclass\n@dataclass\nclass Options:\n    pass\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def file(name: str, source: str) -> str:
        (tmp_path / "reader").mkdir(exist_ok=True)
        (tmp_path / "reader" / f"{name}.py").write_text(source)
        return f"reader.{name}"

    monkeypatch.syspath_prepend(str(tmp_path))
    yield file
    for name in [name for name in sys.modules if name.partition(".")[0] == "reader"]:
        del sys.modules[name]


def entry(**more: Any) -> dict[str, Any]:
    return {"op_types": ["Linear"], "quant_dtype": "int4", **more}


def test_the_gradient_of_an_activation_is_the_users(write):
    how = write("fading", FILE)
    entries = [entry(apply_method=how, apply_options={"by": 10.0})]
    quantizer = calibrated(net(), method="qat", config_list=entries)
    q = quantizer.activations["linear._input_0"]
    x = torch.tensor([[-100.0, 0.01, 100.0, 0.1, 0.2, 0.02]]).requires_grad_()
    out = q(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.1, 1, 0.1, 1, 1, 1]]))
    wanted = fake_quantize(x.detach(), q.scale, q.zero_point, q.spec.dtype)
    torch.testing.assert_close(out.detach(), wanted, atol=1e-5, rtol=0)
    plain = calibrated(net(), method="qat", config_list=[entry()]).activations["linear._input_0"]
    assert torch.equal(plain.scale, q.scale)  # it says nothing of the scale


def test_the_gradient_of_a_weight_is_the_users_by_projection(write):
    """Of the reference: the function in the model, under autograd."""
    how = write("squared", HEAD + (
        "import torch\nfrom dist_compress.quantization.affine import fake_quantize\n"
        "def apply(x, scale, zero_point, dtype, options):\n"
        "    soft = x * x.abs() + 0.1 * x\n"
        "    return soft + (fake_quantize(x, scale, zero_point, dtype) - soft).detach()\n"
    ))  # fmt: skip
    model = net()
    entries = [entry(target_names=["weight"], apply_method=how)]
    quantizer = calibrated(model, method="qat", config_list=entries)
    latent = quantizer.context.projection.latent("linear.weight").clone().requires_grad_()
    model.eval()
    F.cross_entropy(model(EXAMPLE), torch.arange(2)).backward()
    quantizer.before_step(0)
    hidden: list[torch.Tensor] = []
    model.linear.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    model(EXAMPLE)
    q = quantizer.parameters["linear.weight"]
    compressed = q.spec.own(latent, *q.scales_for(latent), q.spec.dtype)
    F.cross_entropy(F.linear(hidden[0], compressed, model.linear.bias), torch.arange(2)).backward()
    torch.testing.assert_close(model.linear.weight.grad, latent.grad)
    torch.testing.assert_close(model.linear.weight.data, compressed.detach())
    quantizer.fold()
    torch.testing.assert_close(convert.convert(model)(EXAMPLE), model(EXAMPLE))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (FILE.replace("def apply", "def appli"), "does not define `apply`"),
        (HEAD + "def apply(x, scale, zero_point, dtype, options):\n    return x * 0.9", "whole numbers q in range"),
        (HEAD + "def apply(x, scale, zero_point, dtype, options):\n    return x[:3]", "shape and dtype of x"),
        (HEAD + "def apply(x, scale):\n    return x", "apply failed on a tensor.*TypeError"),
        (
            HEAD + "from dist_compress.quantization.affine import fake_quantize\n"
            "def apply(x, scale, zero_point, dtype, options):\n"
            "    return fake_quantize(x, scale, zero_point, dtype) + x * 0",
            "is zero everywhere",
        ),
    ],
)  # fmt: skip
def test_files_that_do_not_work_are_refused_before_anything_is_trained(write, source, said):
    how = write("broken", source)
    with pytest.raises(UserError, match=rf"(?s)config_list\[0\]\.apply_method='reader\.broken': .*{said}"):
        attached(net(), method="qat", config_list=[entry(apply_method=how)])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"apply_method": "reader.none"}, r"cannot import 'reader\.none'.*clamp_round, qat_clamp_round"),
        ({"apply_method": "nearest"}, "no such choice. Available: default, clamp_round"),
        ({"apply_method": "clamp_round", "apply_options": {"by": 2}}, "clamp_round has none"),
        ({"apply_options": 3}, "mapping of the options of the apply_method"),
    ],
)
def test_bad_names_and_options(write, keys, said):
    write("unused", "")
    with pytest.raises(UserError, match=said):
        attached(net(), method="qat", config_list=[entry(**keys)])


def test_methods_with_a_rule_of_their_own_have_no_other(write):
    how = write("fading", FILE)
    with pytest.raises(UserError, match=r"quantization\.method='lsq' has a rule of its own, lsq_clamp_round"):
        attached(net(), method="lsq", config_list=[entry(apply_method=how)])


class Scaled(nn.Module):
    """A layer of one's own: no weight, and names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.kernel)


def test_defaults_from_python_under_those_of_yaml_and_of_entries(monkeypatch):
    from dist_compress.quantization import register_defaults
    from dist_compress.quantization.config_list import QUANTIZATION

    monkeypatch.setattr(QUANTIZATION, "registered", {})
    register_defaults(Scaled, {"kernel": {"quant_dtype": "int4", "quant_scheme": "symmetric"}, "_input_0": {}})
    model, x = nn.Sequential(Scaled()), torch.randn(2, 6)

    def of(**config: Any) -> dict[str, tuple[str, str]]:
        quantizer = attached(model, x, method="qat", **config)
        quantizer.hook.remove()
        return {s.path: (s.quant_dtype, s.quant_scheme) for s in quantizer.settings}

    entries = [{"op_types": ["Scaled"]}]
    assert of(config_list=entries) == {"0._input_0": ("uint8", "affine"), "0.kernel": ("int4", "symmetric")}
    model = nn.Sequential(Scaled())
    found = of(config_list=entries, default_settings={"Scaled": {"kernel": {"quant_dtype": "int6"}}})
    assert found["0.kernel"] == ("int6", "symmetric")
    model = nn.Sequential(Scaled())
    found = of(config_list=[{**entries[0], "target_names": ["kernel"], "quant_scheme": "symmetric_restricted"}])
    assert found == {"0.kernel": ("int4", "symmetric_restricted")}
    with pytest.raises(UserError, match=r"register_defaults\(Scaled\)\.kernel\.quant_dtype='int9'"):
        register_defaults(Scaled, {"kernel": {"quant_dtype": "int9"}})
    register_defaults(Scaled, {})
    model = nn.Sequential(Scaled())
    assert list(of(config_list=entries)) == ["0._output_0"]
