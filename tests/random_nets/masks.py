"""Random masks: zeros of rows, columns, biases, affines and heads; aligned or not."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from dist_compress import speedup
from dist_compress.target import Coupling
from random_nets.layers import Attention
from random_nets.net import Builder, RandomNet

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def mask_slices(b: Builder, rng: random.Random) -> None:
    """Whatever comes: masks that nobody checked against the structure, so that much of them has to stay."""
    rows: dict[str, list[int]] = {}
    for fqn, layer in b.net.named_modules():
        if isinstance(layer, Attention):
            _mask_heads(layer, rng)
        elif is_parametrized(layer):
            index = _some(layer.out_features, rng)
            _zero(layer.parametrizations.weight, "original0", 0, index)
            _zero(layer, "bias", 0, index)
        elif isinstance(layer, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) and rng.random() < 0.75:
            index = _mask_weight(layer, rng)
            if index is not None:
                rows[fqn] = index
        elif isinstance(layer, nn.MultiheadAttention):
            head = rng.randrange(layer.num_heads)
            size = layer.head_dim
            index = [part * layer.embed_dim + head * size + i for part in range(3) for i in range(size)]
            for name in ("in_proj_weight", "in_proj_bias") if rng.random() < 0.7 else ():
                _zero(layer, name, 0, index)
        elif isinstance(layer, nn.RNNBase) and rng.random() < 0.7:
            gates = layer.weight_hh_l0.shape[0] // layer.hidden_size
            unit = rng.randrange(layer.hidden_size)
            for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                _zero(layer, name, 0, [gate * layer.hidden_size + unit for gate in range(gates)])
        elif "Norm" in type(layer).__name__ and getattr(layer, "weight", None) is not None and rng.random() < 0.1:
            _zero(layer, rng.choice(("weight", "bias")), 0, _some(len(layer.weight), rng))
    for maker, reader in b.fed:
        norm = b.net.get_submodule(reader)
        if maker in rows and "Norm" in type(norm).__name__ and getattr(norm, "weight", None) is not None:
            for name in ("weight", "bias") if rng.random() < 0.85 else ():
                if rows[maker] and len(norm.weight) > rows[maker][-1]:
                    _zero(norm, name, 0, rows[maker])
    for fqn, parameter in b.net.named_parameters():
        owner, _, name = fqn.rpartition(".")
        if name in ("gamma", "token", "table") and rng.random() < 0.3:
            dim = max(range(parameter.dim()), key=lambda d: parameter.shape[d])
            _zero(b.net.get_submodule(owner), name, dim, _some(parameter.shape[dim], rng))


def mask_groups(net: RandomNet, coupling: Coupling, rng: random.Random) -> dict[int, torch.Tensor]:
    """Some units of each group that is free; {group index: the units masked}."""
    masked = {}
    for i, group in enumerate(coupling.groups):
        if not group.blocked and group.num_units > 1:
            masked[i] = torch.tensor(_some(group.num_units, rng))
            speedup.mask_units(net, group, masked[i])
    return masked


def _some(size: int, rng: random.Random) -> list[int]:
    """Sorted, at least one and half of them at most; none of one."""
    return sorted(rng.sample(range(size), rng.randint(1, size // 2))) if size > 1 else []


def _zero(layer: nn.Module, name: str, dim: int, index: list[int]) -> None:
    parameter = getattr(layer, name, None)
    if parameter is not None:
        with torch.no_grad():
            parameter.index_fill_(dim, torch.tensor(index, dtype=torch.int64), 0.0)


def _mask_weight(layer: nn.Module, rng: random.Random) -> list[int] | None:
    """Zero slices of outputs (their indices are returned) or of inputs."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    out = 1 if transposed or isinstance(layer, nn.Embedding) else 0
    if rng.random() < 0.25:
        _zero(layer, "weight", 1 - out, _some(weight.shape[1 - out], rng))
        return None
    if groups == 1 or transposed:
        index = _some(weight.shape[out], rng)
    else:
        index = _grouped(weight.shape[0], groups, rng)
    _zero(layer, "weight", out, index)
    if transposed and groups > 1:
        index = [g * weight.shape[1] + i for g in range(groups) for i in index]
    if rng.random() < 0.9:
        _zero(layer, "bias", 0, index)
    return index


def _grouped(channels: int, groups: int, rng: random.Random) -> list[int]:
    """The same positions of each group, whole groups, or anything."""
    each = channels // groups
    how = rng.random()
    if how < 0.4:
        return [g * each + i for i in _some(each, rng) for g in range(groups)]
    if how < 0.8:
        return [g * each + i for g in _some(groups, rng) for i in range(each)]
    return _some(channels, rng)


def _mask_heads(layer: Attention, rng: random.Random) -> None:
    """Of a few key heads: all rows, only the values, only the columns of the output, or a part of the rows."""
    how = rng.choice(("none", "all", "all", "values", "columns", "part"))
    size, repeats = layer.head_dim, layer.num_heads // layer.num_kv_heads
    for head in _some(layer.num_kv_heads, rng) if how != "none" else ():
        keys = list(range(head * size, (head + 1) * size))
        queries = list(range(head * repeats * size, (head + 1) * repeats * size))
        if how == "columns":
            _zero(layer.proj, "weight", 1, queries)
            continue
        if how == "part":
            keys, queries = keys[: size // 2], [q for q in queries if q % size < size // 2]
        if layer.qkv is not None:
            width = layer.num_heads * size
            parts = (2,) if how == "values" else (0, 1, 2)
            targets = [(layer.qkv, [part * width + i for part in parts for i in keys])]
        else:
            targets = [(layer.v, keys)] if how == "values" else [(layer.q, queries), (layer.k, keys), (layer.v, keys)]
        for linear, index in targets:
            _zero(linear, "weight", 0, index)
            _zero(linear, "bias", 0, index)
