"""Models without values are called: shapes of what weights make, values of all else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_compress import models
from dist_compress.config import ModelConfig
from dist_compress.initial import places_of
from dist_compress.sites import Sites
from dist_compress.tracing.untouched import untouched
from dist_compress.tracing.weightless import is_weightless, weightless

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS, MASK = torch.arange(24).view(2, 12), torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
MASKED = {"input_ids": IDS, "attention_mask": MASK}
IMAGES = {"x": torch.randn(2, 3, 64, 64)}
CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "llama": (ModelConfig("hf", "llama", "causal_lm", kwargs={**SIZES, "num_key_value_heads": 2}), {"input_ids": IDS}),
    "gpt2": (ModelConfig("hf", "gpt2", "causal_lm", kwargs={"n_embd": 16, "n_layer": 2, "n_head": 4}), MASKED),
    "bert": (ModelConfig("hf", "bert", "sequence_classification", kwargs=SIZES), MASKED),
    "swin": (ModelConfig("timm", "swin_tiny_patch4_window7_224", kwargs={"img_size": 64, "depths": [1] * 4}), IMAGES),
    "resnet": (ModelConfig("torchvision", "resnet18"), IMAGES),
}  # fmt: skip


def emptied(model: nn.Module) -> nn.Module:
    for parameter, places in places_of(model).items():
        for module, name in places:
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta")))
    return model


@pytest.mark.parametrize("name", CASES)
def test_sites_are_those_of_the_model_with_values(name: str) -> None:
    config, inputs = CASES[name]
    args, kwargs = (tuple(inputs.values()), {}) if "x" in inputs else ((), inputs)
    real = Sites(models.build(config, 5, 0, 64), args, kwargs).by_module
    model = emptied(models.build(config, 5, 0, 64))
    buffers = [b.clone() for b in model.buffers()]
    assert is_weightless(model) and Sites(model, args, kwargs).by_module == real
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


class Net(nn.Module):
    """Looks at its inputs, at a buffer and at a count; `looks`: at what its weights make, too."""

    def __init__(self, looks: bool = False) -> None:
        super().__init__()
        self.layer, self.core, self.looks = nn.Linear(4, 4), nn.GRU(4, 4), looks
        self.register_buffer("limit", torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> Any:
        y, _ = self.core(self.layer(x))
        places = torch.arange(len(y), device=y.device)
        keep = (x > self.limit).to(y.device)
        large = x.max().item() if places.max().item() == len(x) - 1 and keep.any() else y.max().item()
        seen = y.sum().item() if self.looks else 0.0
        return y.masked_fill(keep, large).to(x.device), seen


def test_what_no_weight_made_has_values() -> None:
    model, x = emptied(Net()), torch.arange(8.0).view(2, 4)
    with pytest.raises((RuntimeError, NotImplementedError)):  # a negative control: as it is it cannot be called
        model(x)
    with weightless(model), untouched(model):
        y, _ = model(x)
    assert y.is_meta and y.shape == (2, 4)
    looks = emptied(Net(looks=True))
    with pytest.raises(RuntimeError, match="item"), weightless(looks), untouched(looks):
        looks(x)


def test_a_model_with_values_is_called_as_ever() -> None:
    model, x = Net(looks=True), torch.arange(8.0).view(2, 4)
    right = model(x)[0]
    with weightless(model):
        assert torch.equal(model(x)[0], right)
