"""The product of rows of inputs and weights is what the layer computes."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dist_compress.linear_form import from_rows, has_linear_form, input_rows, weight_rows

LAYERS = [
    (nn.Linear(6, 4), (5, 6)),
    (nn.Linear(6, 4), (2, 3, 6)),
    (Conv1D(4, 6), (2, 3, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 8, 7)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, padding=1), (4, 5, 5)),  # one sample without a batch dim
    (nn.Conv3d(2, 4, 2), (1, 2, 3, 4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x))
def test_it_is_the_layer(layer, shape):
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert has_linear_form(layer)
    weight, inputs = weight_rows(layer, layer.weight), input_rows(layer, x)
    product = inputs @ weight.transpose(1, 2)  # [groups, tokens, rows]
    product = product.movedim(0, 1).flatten(1)  # [tokens, outputs]
    want = layer(x) - (
        0 if layer.bias is None else layer.bias.view(-1, *[1] * (len(getattr(layer, "kernel_size", ()))))
    )
    if hasattr(layer, "kernel_size"):
        want = want.movedim(1 if x.dim() == len(layer.kernel_size) + 2 else 0, -1)
    torch.testing.assert_close(product, want.reshape(product.shape))
    assert torch.equal(from_rows(layer, weight, layer.weight.shape), layer.weight)


def test_input_channels_run_fastest():
    conv = nn.Conv2d(4, 2, 3)
    weight = torch.arange(conv.weight.numel()).view(conv.weight.shape)
    assert weight_rows(conv, weight)[0, 1, 4:8].tolist() == weight[1, :, 0, 1].tolist()


def test_others_have_none():
    assert not any(map(has_linear_form, (nn.Embedding(3, 4), nn.ConvTranspose2d(2, 2, 2), nn.BatchNorm2d(3))))
