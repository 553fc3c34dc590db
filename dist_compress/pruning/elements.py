"""Element granularity: single weights, scored and counted by one rank each; nobody holds all scores.

Each rank owns a slice of every tensor. What it decides for its slice reaches the others as packed bits, so
replicated masks have equal bits even if replicas had drifted apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dist_compress.errors import UserError
from dist_compress.pruning.config_list import Setting
from dist_compress.pruning.mask import gather_bits, offsets, owned_slice, owners
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.select import Group, Shard, select
from dist_compress.pruning.sparsity import count_bounds, share
from dist_compress.target import Coupling


@dataclass(frozen=True)
class ElementTensor:
    """The weight of one target."""

    name: str  # of the parameter, its first one
    num: int
    base: int  # global index of its first element
    cost: int  # of one element, in the currency of its global group
    setting: Setting


class Elements:
    """All element targets. `removed` is the decision so far: {parameter: bool, flat}, the same on every
    rank."""

    def __init__(self, settings: Sequence[Setting], model: nn.Module, coupling: Coupling, compute: str) -> None:
        names, starts = owners(model), offsets(model)
        macs = {layer.fqn: layer.macs for layer in coupling.layers}
        self.removed: dict[str, torch.Tensor] = {}
        self.groups: dict[str, list[ElementTensor]] = {}
        for setting in settings:
            if setting.align or setting.granularity != "element":
                continue
            name = names[f"{setting.module}.weight"]
            if name in self.removed:
                raise UserError(
                    f"{setting.said_by('granularity')}: {setting.module} shares its weight {name} with another target. "
                    "Exclude one of them with exclude_op_names."
                )
            weight = model.get_parameter(name)
            self.removed[name] = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            in_macs = compute == "macs" and setting.global_group_id is not None
            if in_macs and macs.get(setting.module, 0) < weight.numel():
                raise UserError(f"pruning.compute=macs: the trace has no MACs for {setting.module}. Use params.")
            cost = macs[setting.module] // weight.numel() if in_macs else 1
            tensor = ElementTensor(name, weight.numel(), starts[name], cost, setting)
            group = f"global_group_id={setting.global_group_id!r}" if setting.global_group_id else setting.module
            self.groups.setdefault(group, []).append(tensor)
        for tensors in self.groups.values():
            _target(tensors, 1.0)

    def tensors(self) -> list[ElementTensor]:
        return [tensor for tensors in self.groups.values() for tensor in tensors]

    def decide(
        self,
        fraction: float,
        metrics: Mapping[str, Metric],
        latent: Callable[[str], torch.Tensor],
        grads: Mapping[str, torch.Tensor],
    ) -> None:
        """Update `removed`. Collective. `metrics` by module; `grads` holds this rank's slices of flat
        gradients."""
        groups, parts = [], []
        for name, tensors in self.groups.items():
            shards = []
            for tensor in tensors:
                start, end = owned_slice(tensor.num)
                weight = latent(tensor.name).flatten()[start:end, None]
                scores = metrics[tensor.setting.module].block_scores(weight, grads.get(tensor.name)).float()
                scores = scores.masked_fill(self.removed[tensor.name][start:end], -torch.inf)
                shards.append(Shard(tensor.setting.module, tensor.base + start, scores, tensor.cost))
            target, bounds = _target(tensors, fraction)
            groups.append(Group(name, target, [t.setting.module for t in tensors], shards, bounds))
        for masks in select(groups):
            parts.extend(masks)
        tensors = self.tensors()
        for tensor, removed in zip(tensors, gather_bits(parts, [t.num for t in tensors]), strict=True):
            self.removed[tensor.name] = removed

    def masks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """{parameter: bool, True = keep}."""
        return {name: ~gone.view(model.get_parameter(name).shape) for name, gone in self.removed.items()}

    def given(self, tensors: Sequence[ElementTensor]) -> float:
        """Fraction of the cost of a group that is removed."""
        gone = sum(int(self.removed[t.name].sum()) * t.cost for t in tensors)
        return gone / sum(t.num * t.cost for t in tensors)


def _target(tensors: Sequence[ElementTensor], fraction: float) -> tuple[int, dict[str, tuple[int, int]]]:
    """(cost to remove, bounds in elements by module) of a group. Raises UserError when the bounds forbid
    the ratio."""
    setting = tensors[0].setting
    ratio = share(setting.sparse_ratio, fraction)
    if setting.global_group_id is None:
        return math.floor(ratio * tensors[0].num), {}
    total = sum(t.num * t.cost for t in tensors)
    exact = [
        sum(share(getattr(t.setting, key), f) * t.num * t.cost for t in tensors)
        for key, f in (("min_sparse_ratio", fraction), ("max_sparse_ratio", 1.0))
    ]
    if not exact[0] <= ratio * total <= exact[1]:
        raise UserError(
            f"global_group_id={setting.global_group_id!r}: {setting.said_by('sparse_ratio')} asks to remove "
            f"{float(ratio * total):.6g} of {total}, but min_sparse_ratio and max_sparse_ratio of its members allow "
            f"{float(exact[0]):.6g} to {float(exact[1]):.6g} only. Change one of them."
        )
    bounds = {t.setting.module: count_bounds(t.num, t.setting, fraction) for t in tensors}
    low, high = (sum(bounds[t.setting.module][k] * t.cost for t in tensors) for k in (0, 1))
    free = all(bounds[t.setting.module] == (0, t.num) for t in tensors)
    return min(max(math.ceil(ratio * total), low), high), {} if free else bounds


def keep_gradients(elements: Elements, model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's slice of the reduced gradient of every tensor, flat; zeros where there is none. Local."""
    grads = {}
    for tensor in elements.tensors():
        start, end = owned_slice(tensor.num)
        grad = model.get_parameter(tensor.name).grad
        flat = torch.zeros(end - start, 1) if grad is None else grad.detach().flatten()[start:end, None].clone()
        grads[tensor.name] = flat.to(elements.removed[tensor.name].device)
    return grads
