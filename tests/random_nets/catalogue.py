"""The steps a random model is drawn from: each adds layers behind value `i` and returns the index of the new value.

None says that the step does not fit there. Sizes stay tiny, so that a model takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from random_nets import layers
from random_nets.net import Builder

Drawn = Callable[[Builder, int], "int | None"]


def activation(b: Builder, i: int) -> int:
    return b.add(b.pick(*layers.ACTIVATIONS), i)


# -- images [batch, channels, height, width] --------------------------------------------------------------------------


def conv(b: Builder, i: int) -> int:
    channels, height, _ = b.sizes(i)
    kernel = b.pick(1, 1, 3) if height >= 3 else 1
    groups = b.pick(*[g for g in (1, 1, 1, 2, 3) if channels % g == 0])
    padding = b.pick(0, kernel // 2)
    stride = b.pick(1, 1, 2)
    out = b.pick(4, 6, 8) if groups == 1 else groups * b.pick(2, 3)
    return b.add(nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=b.maybe(0.6)), i)


def depthwise(b: Builder, i: int) -> int:
    channels, height, _ = b.sizes(i)
    kernel = 3 if height >= 3 else 1
    multiplier = b.pick(1, 1, 2)
    settings = {"padding": kernel // 2, "groups": channels, "bias": b.maybe(0.5)}
    return b.add(nn.Conv2d(channels, multiplier * channels, kernel, **settings), i)


def transposed(b: Builder, i: int) -> int | None:
    channels, height, _ = b.sizes(i)
    if height > 4:
        return None
    groups = b.pick(*[g for g in (1, 1, 2) if channels % g == 0])
    out = groups * b.pick(2, 3, 4)
    settings = {"stride": 2, "output_padding": b.pick(0, 1), "groups": groups, "bias": b.maybe(0.5)}
    return b.add(nn.ConvTranspose2d(channels, out, 2, **settings), i)


def image_norm(b: Builder, i: int) -> int:
    channels = b.sizes(i)[0]
    kind = b.pick("batch", "batch", "batch", "group", "instance", "layer")
    if kind == "batch" or (kind == "instance" and b.sizes(i)[1] < 2):
        return b.add(nn.BatchNorm2d(channels, affine=b.maybe(0.9)), i)
    if kind == "group":
        most = channels if b.sizes(i)[1] > 1 else channels // 2  # one value has no variance
        groups = b.pick(*[g for g in (1, 2, 3, 4, most) if channels % g == 0 and g <= most])
        return b.add(nn.GroupNorm(groups, channels, affine=b.maybe(0.8)), i)
    if kind == "instance":
        return b.add(nn.InstanceNorm2d(channels, affine=b.maybe(0.5)), i)
    return b.add(layers.ChannelsLastNorm(channels), i)


def conv_norm_act(b: Builder, i: int) -> int:
    return activation(b, image_norm(b, conv(b, i)))


def pool(b: Builder, i: int) -> int | None:
    if b.sizes(i)[1] < 4:
        return None
    choices = (
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1, count_include_pad=b.maybe(0.5)),
        nn.AdaptiveAvgPool2d(2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    )
    return b.add(b.pick(*choices), i)


def squeeze_excite(b: Builder, i: int) -> int:
    gate = b.pick(nn.Sigmoid(), nn.Hardsigmoid())
    return b.add(layers.SqueezeExcite(b.sizes(i)[0], b.pick(2, 4), gate), i)


def shuffle(b: Builder, i: int) -> int | None:
    groups = [g for g in (2, 3, 4) if b.sizes(i)[0] % g == 0 and b.sizes(i)[0] > g]
    if not groups:
        return None
    groups = b.pick(*groups)
    return b.add(b.pick(layers.Shuffle, nn.ChannelShuffle)(groups), i)


def pixel_shuffle(b: Builder, i: int) -> int | None:
    channels, height, width = b.sizes(i)
    if channels % 4 == 0 and height <= 4 and channels >= 8:
        return b.add(nn.PixelShuffle(2), i)
    if height % 2 == 0 and width % 2 == 0 and channels <= 4:
        return b.add(nn.PixelUnshuffle(2), i)
    return None


def halves(x: torch.Tensor, dim: int = 1) -> list[torch.Tensor]:
    """The two halves of a dim, by its size."""
    return [x.narrow(dim, 0, x.shape[dim] // 2), x.narrow(dim, x.shape[dim] // 2, x.shape[dim] // 2)]


def cut(b: Builder, i: int) -> int | None:
    """Chunk the features, then gate, add, swap or go on with one part."""
    dim = 1 if len(b.sizes(i)) == 3 else -1
    if b.sizes(i)[0 if dim == 1 else -1] % 2:
        return None
    first = b.add(b.pick(partial(torch.chunk, chunks=2, dim=dim), partial(halves, dim=dim)), i)
    how = b.pick("gate", "add", "swap", "half")
    if how == "half":
        return first
    if how == "gate":
        return b.add(torch.mul, b.add(torch.sigmoid, first), first + 1)
    return b.add(torch.add, first, first + 1) if how == "add" else b.add(cat(dim), first + 1, first)


def cat(dim: int) -> Callable[..., torch.Tensor]:
    return lambda *parts: torch.cat(parts, dim)


def concatenate(b: Builder, i: int) -> int | None:
    """With an earlier value that differs in the features only."""
    dim = 1 if len(b.sizes(i)) == 3 else b.values[i].dim() - 1
    rest = [n for d, n in enumerate(b.values[i].shape) if d != dim]

    def fits(value: torch.Tensor) -> bool:
        alike = value.is_floating_point() and value.dim() == b.values[i].dim()
        return alike and [n for d, n in enumerate(value.shape) if d != dim] == rest

    other = b.pick(*[j for j, value in enumerate(b.values) if fits(value)])
    if b.values[i].shape[dim] + b.values[other].shape[dim] > 16:
        return None
    return b.add(cat(dim), *b.pick((i, other), (other, i)))


def combine(b: Builder, i: int) -> int | None:
    """Add to or multiply with an earlier value of the same shape: residuals of any length."""
    others = b.same_shape(i)
    if not others:
        return None
    return b.add(b.pick(torch.add, torch.add, torch.mul, torch.sub, torch.maximum), i, b.pick(*others))


def residual_block(b: Builder, i: int) -> int | None:
    channels = b.sizes(i)[0]
    hidden = b.pick(4, 6)
    y = b.add(nn.Conv2d(channels, hidden, 1, bias=b.maybe(0.5)), i)
    y = activation(b, image_norm(b, y))
    y = b.add(nn.Conv2d(hidden, channels, 3, padding=1, bias=b.maybe(0.5)), y)
    return b.add(torch.add, i, image_norm(b, y) if b.maybe(0.6) else y)


def shared_image(b: Builder, i: int) -> int:
    """One convolution used twice, on its own output or on the input of its first use."""
    channels = b.sizes(i)[0]
    layer = nn.Conv2d(channels, channels, 1, bias=b.maybe(0.5))
    y = activation(b, b.add(layer, i))
    return b.add(layer, y)


def move(b: Builder, i: int) -> int | None:
    """Pure data movement."""
    rank = b.values[i].dim()
    feature = 1 if rank == 4 else rank - 1
    size = b.values[i].shape[feature]
    if size < 3:
        return None
    choices: list[Callable[..., torch.Tensor]] = [
        partial(torch.roll, shifts=1, dims=feature),
        partial(torch.flip, dims=[feature]),
        layers.Pick(b.rng.sample(range(size), max(2, size - 2)), feature),
        layers.Literal(1, size, feature),
        layers.Literal(0, size - 1, feature),
    ]
    if rank == 4:
        choices += [
            partial(F.pad, pad=(1, 0, 0, 1), value=b.pick(0.0, 0.5)),
            partial(F.pad, pad=(0, 0, 0, 0, 1, 2)),
            partial(torch.transpose, dim0=2, dim1=3),
            partial(torch.roll, shifts=(1, -1), dims=(2, 3)),
            partial(F.interpolate, scale_factor=2, mode="nearest"),
            partial(F.pad, pad=(1, 1, 1, 1), mode="reflect") if b.sizes(i)[1] > 2 else torch.neg,
        ]
    else:
        choices += [partial(F.pad, pad=(1, 1)), partial(torch.repeat_interleave, repeats=2, dim=feature)]
    made = b.add(b.pick(*choices), i)
    return made if max(b.sizes(made)) <= 16 else None


def scale(b: Builder, i: int) -> int:
    sizes = b.sizes(i)
    shape = (sizes[0], 1, 1) if len(sizes) == 3 else (sizes[-1],)
    return b.add(layers.Scale(shape, b.maybe(0.4)), i)


def image_to_vector(b: Builder, i: int) -> int | None:
    channels, height, width = b.sizes(i)
    if b.maybe(0.5) and channels * height * width <= 150:
        return b.add(nn.Linear(channels * height * width, b.pick(4, 6, 8)), b.add(nn.Flatten(), i))
    how = b.pick(partial(torch.mean, dim=(2, 3)), partial(torch.amax, dim=(-2, -1)), partial(torch.sum, dim=[2, 3]))
    return b.add(how, i)


def image_to_tokens(b: Builder, i: int) -> int | None:
    if b.sizes(i)[1] * b.sizes(i)[2] > 16:
        return None
    return b.add(partial(torch.transpose, dim0=1, dim1=2), b.add(partial(torch.flatten, start_dim=2), i))


# -- tokens [batch, tokens, features] and vectors [batch, features] ---------------------------------------------------


def linear(b: Builder, i: int) -> int:
    return b.add(nn.Linear(b.sizes(i)[-1], b.pick(4, 6, 8, 12), bias=b.maybe(0.7)), i)


def linear_act(b: Builder, i: int) -> int:
    return activation(b, linear(b, i))


def feature_norm(b: Builder, i: int) -> int:
    width = b.sizes(i)[-1]
    if len(b.sizes(i)) == 1 and b.maybe(0.6):
        return b.add(nn.BatchNorm1d(width), i)
    if b.maybe(0.2):
        return b.add(layers.OwnNorm(width), i)
    return b.add(b.pick(nn.LayerNorm, nn.RMSNorm)(width, eps=1e-6, elementwise_affine=b.maybe(0.8)), i)


def mlp(b: Builder, i: int) -> int:
    y = feature_norm(b, i) if b.maybe(0.5) else i
    kind = b.pick("plain", "gated", "fused")
    y = b.add(layers.Mlp(b.sizes(i)[-1], b.pick(6, 8), kind, b.maybe(0.6)), y)
    return b.add(torch.add, i, y)


def attention(b: Builder, i: int) -> int | None:
    if b.sizes(i)[0] > layers.MOST_TOKENS:
        return None
    heads, head_dim = b.pick(2, 3, 4), b.pick(2, 4)
    fused = b.maybe(0.4)
    kv_heads = heads if fused else b.pick(*[n for n in (1, 2, 3, 4) if heads % n == 0])
    y = feature_norm(b, i) if b.maybe(0.4) else i
    settings = (b.sizes(i)[-1], heads, kv_heads, head_dim, fused, b.maybe(0.3), b.maybe(0.6))
    y = b.add(layers.Attention(*settings), y)
    return b.add(torch.add, i, y) if b.maybe(0.7) else y


def multihead(b: Builder, i: int) -> int | None:
    width = b.sizes(i)[-1]
    heads = [n for n in (2, 3) if width % n == 0]
    if not heads:
        return None
    return b.add(torch.add, i, b.add(layers.SelfAttention(width, b.pick(*heads), b.maybe(0.7)), i))


def recurrent(b: Builder, i: int) -> int:
    cell = b.pick(nn.GRU, nn.LSTM)(b.sizes(i)[-1], b.pick(3, 4), batch_first=True, bidirectional=b.maybe(0.2))
    return b.add(layers.Recurrent(cell), i)


def weight_norm(b: Builder, i: int) -> int:
    return b.add(parametrizations.weight_norm(nn.Linear(b.sizes(i)[-1], b.pick(4, 6))), i)


def group_mix(b: Builder, i: int) -> int | None:
    width = b.sizes(i)[-1]
    groups = [g for g in (2, 3, 4) if width % g == 0 and width > g]
    if not groups:
        return None
    groups = b.pick(*groups)
    return b.add(layers.GroupMix(groups, width // groups, b.pick("sum", "mean", "softmax", "swap")), i)


def shared_linear(b: Builder, i: int) -> int:
    """One linear layer used twice, or two layers with one weight."""
    width = b.sizes(i)[-1]
    one, two = nn.Linear(width, width), nn.Linear(width, width)
    if b.maybe(0.5):
        two.weight = one.weight
    else:
        two = one
    return b.add(two, activation(b, b.add(one, i)))


def token_mix(b: Builder, i: int) -> int:
    b.any_length = False
    return b.add(torch.add, i, b.add(layers.TokenMix(b.sizes(i)[0], b.pick(3, 4)), i))


def positions(b: Builder, i: int) -> int:
    """With rows for longer inputs, too."""
    return b.add(layers.Positions(*b.sizes(i)), i)


def first_token(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def tokens_to_vector(b: Builder, i: int) -> int:
    if b.maybe(0.3):
        b.any_length = False
        return b.add(partial(torch.flatten, start_dim=1), i)
    return b.add(b.pick(partial(torch.mean, dim=1), partial(torch.amax, dim=1), first_token), i)


IMAGE: tuple[Drawn, ...] = (
    conv, conv, conv_norm_act, conv_norm_act, conv_norm_act, depthwise, transposed, image_norm, activation, pool,
    squeeze_excite, shuffle, pixel_shuffle, cut, concatenate, combine, residual_block, residual_block, shared_image,
    move, scale, image_to_vector, image_to_tokens,
)  # fmt: skip
TOKENS: tuple[Drawn, ...] = (
    linear, linear_act, feature_norm, mlp, mlp, attention, attention, multihead, recurrent, weight_norm, group_mix,
    shared_linear, token_mix, positions, cut, concatenate, combine, move, scale, tokens_to_vector,
)  # fmt: skip
VECTOR: tuple[Drawn, ...] = (
    linear, linear_act, linear_act, feature_norm, mlp, weight_norm, group_mix, shared_linear, cut, concatenate, combine,
    move, scale,
)  # fmt: skip
