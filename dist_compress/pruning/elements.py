"""Blocks of weights, single weights and N:M patterns: scored and counted by one rank each; nobody holds all scores.

Each rank decides the slabs of every tensor that it owns (see `ownership`). What it decides reaches those who hold the
weights as packed bits, so replicated masks have equal bits even if replicas had drifted apart. A threshold becomes a
count, which the first collective of the selection sums over the ranks; then it is a ratio like any other. N:M patterns
and rows are decided where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dist_compress.blocks import Blocks
from dist_compress.errors import UserError
from dist_compress.exchange import Span
from dist_compress.layout import Layout
from dist_compress.pruning import seen
from dist_compress.pruning.mask import offsets, owners
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.radix import score_key, tie_key
from dist_compress.pruning.regrow import Swap, select_swapping, swapped
from dist_compress.pruning.removed import Removed
from dist_compress.pruning.select import Group, Shard
from dist_compress.pruning.setting import Setting
from dist_compress.pruning.sparsity import count_bounds, share, threshold, threshold_count
from dist_compress.target import Coupling

GRAD = "grad of "  # of a parameter: its name in an exchange


@dataclass(frozen=True)
class BlockTensor:
    """A target that is decided by blocks of weights; a single weight is a block of one."""

    name: str  # of the parameter, its first one
    base: int  # global index of its first block
    cost: int  # of one block, in the currency of its global group
    setting: Setting
    blocks: Blocks
    in_runs: bool = False  # the ratio holds in each run of `blocks.group`, which is decided where it lies

    @property
    def num(self) -> int:
        return self.blocks.num


@dataclass(frozen=True)
class Choice:
    """What this rank decided, before anybody else hears of it."""

    parts: dict[str, list[torch.Tensor]]  # {parameter: bool [blocks], True = removed, of each run it decides}
    regrown: list[str]  # parameters of which something may have come back
    tally: dict[str, torch.Tensor]  # {group: counts of the scores of this rank, as in `seen`}
    before: dict[str, torch.Tensor]  # `Elements.removed`


class Elements:
    """All targets by blocks. `place` comes before the first decision."""

    def __init__(
        self,
        settings: Sequence[Setting],
        model: nn.Module,
        coupling: Coupling,
        compute: str,
        metrics: Mapping[str, Metric],
    ) -> None:
        """`metrics` by target. Raises UserError."""
        names, starts = owners(model), offsets(Layout(model))
        macs = {layer.fqn: layer.macs for layer in coupling.layers}
        self.groups: dict[str, list[BlockTensor]] = {}
        self.decided: Removed | None = None
        for setting in settings:
            if setting.align or setting.by_units:
                continue
            name = names[setting.parameter]
            if name in {t.name for t in self.tensors()}:
                raise UserError(
                    f"{setting.said_by('granularity')}: {setting.name} shares its weight {name} with another target. "
                    "Exclude one of them with exclude_op_names."
                )
            weight = model.get_parameter(name)
            kind = type(model.get_submodule(setting.module)).__name__
            blocks = Blocks.of(setting.granularity, weight.shape, kind, f"{setting.name}: granularity")
            by_rows = metrics[setting.name].by_rows and _by_rows(setting)
            if by_rows:
                blocks = Blocks.in_rows(weight.shape, kind)
            in_macs = compute == "macs" and setting.global_group_id is not None
            if in_macs and (setting.target != "weight" or macs.get(setting.module, 0) < weight.numel()):
                raise UserError(
                    f"pruning.compute=macs: the trace has no MACs for {setting.name} "
                    f"({setting.said_by('global_group_id')}). Use params."
                )
            each = macs[setting.module] // weight.numel() if in_macs else 1
            in_runs = by_rows or setting.pattern is not None
            tensor = BlockTensor(name, starts[name], each * blocks.size, setting, blocks, in_runs)
            group = f"global_group_id={setting.global_group_id!r}" if setting.global_group_id else setting.name
            self.groups.setdefault(group, []).append(tensor)
        for tensors in self.groups.values():
            if _has_ratio(tensors[0]):
                _target(tensors, 1.0)

    def tensors(self) -> list[BlockTensor]:
        return [tensor for tensors in self.groups.values() for tensor in tensors]

    def place(self, layout: Layout) -> None:
        """Say who holds what from here on; nothing is removed yet. Local."""
        self.decided = Removed({t.name: t.blocks for t in self.tensors()}, layout)

    @property
    def placed(self) -> Removed:
        assert self.decided, "place comes first"
        return self.decided

    @property
    def removed(self) -> dict[str, torch.Tensor]:
        """The decision so far: {parameter: bool [blocks that this rank holds]}."""
        if self.decided is None:
            return {x.name: torch.zeros(x.num, dtype=torch.bool) for x in self.tensors()}
        return self.decided.bits

    def num_removed(self, tensor: BlockTensor) -> int:
        """Blocks that are removed, over all ranks. Local, the same on every rank."""
        return self.decided.counts[tensor.name] if self.decided else 0

    def wants(self, rank: int, metrics: Mapping[str, Metric], gradients: bool) -> list[Span]:
        """What `rank` needs to score the targets in `metrics`: its weights, and if there are `gradients`, theirs where
        they are heard. Local."""
        return [
            Span(name, first, first + count)
            for t in self.tensors()
            if (metric := metrics.get(t.setting.name)) and not metric.solves
            for name in ([t.name, GRAD + t.name] if gradients and metric.hears_gradients else [t.name])
            for first, count in self.placed.weights(t.name, rank)
        ]

    def choose(
        self,
        t: int,
        fraction: float,
        metrics: Mapping[str, Metric],
        weights: Mapping[str, Sequence[torch.Tensor]],
        heard: Mapping[str, Sequence[torch.Tensor]],
        also: Sequence[torch.Tensor],
    ) -> Choice:
        """What is to be removed of the targets in `metrics` that are scored; nothing is changed. Collective, if there
        are any or anything in `also`: int64 tensors that are summed over the ranks on the way, in place.

        `weights` and `heard`, by parameter: for each run of slabs that this rank decides [blocks, weights of a block]
        of the latent, and of what data says of it.
        """
        scored = {target for target, metric in metrics.items() if not metric.solves}
        deciding = {name: members for name, members in self.groups.items() if members[0].setting.name in scored}
        tensors = [tensor for members in deciding.values() for tensor in members]
        shown = list(deciding)[: seen.MOST_GROUPS]
        spots: dict[str, list[torch.Tensor]] = {x.name: [] for n in shown for x in deciding[n]}
        shards = {
            x.name: self._shards(x, metrics[x.setting.name], weights[x.name], heard.get(x.name), spots.get(x.name))
            for x in tensors
        }
        groups, swaps = [], {}
        for name, members in deciding.items():
            if not members[0].in_runs:
                metric, head = metrics[members[0].setting.name], members[0]
                own, unit = [shard for x in members for shard in shards[x.name]], math.gcd(*(x.cost for x in members))
                names, said = [x.setting.name for x in members], head.setting.said_by("method")
                if head.setting.sparse_threshold is not None:
                    limit = threshold(head.setting, fraction)
                    groups.append(Group(name, _by_threshold(head, fraction), names, own, {}, unit, limit, said))
                    continue
                target, bounds = _target(members, fraction)
                groups.append(Group(name, target, names, own, bounds, unit, source=said))
                if metric.regrows and head.name in heard:
                    total = head.num * head.cost
                    growth = [metric.growth_scores(*x) for x in zip(weights[head.name], heard[head.name], strict=True)]
                    swaps[name] = Swap(swapped(metric.exchanged(t), total - target, head.cost), growth)
        checked = [
            (x.setting.name, x.setting.said_by("method"), [shard.scores for shard in shards[x.name]])
            for x in tensors
            if x.in_runs
        ]
        chosen = iter([mask for masks in select_swapping(groups, swaps, checked, also) for mask in masks])
        parts = {
            x.name: [_in_runs(x, shard, fraction) if x.in_runs else next(chosen) for shard in shards[x.name]]
            for x in tensors
        }
        tally = {name: seen.count_all([(spots[x.name], parts[x.name]) for x in deciding[name]]) for name in shown}
        return Choice(parts, [x.name for x in tensors if metrics[x.setting.name].regrows], tally, dict(self.removed))

    def take(self, choice: Choice) -> None:
        """Update `removed`. Collective, if anything is chosen."""
        if choice.parts:
            self.placed.tell(choice.parts)

    def reset(self, choice: Choice, latent: Callable[[str], torch.Tensor]) -> None:
        """What came back starts at zero. `latent`: what this rank holds of a parameter. Local."""
        for name in choice.regrown:
            back = choice.before[name] & ~self.removed[name]
            latent(name).masked_fill_(self.placed.spread(name, back), 0)

    def _shards(
        self, x: BlockTensor, metric: Metric, weights: Sequence[torch.Tensor], heard: Sequence[torch.Tensor] | None,
        spots: list[torch.Tensor] | None,
    ) -> list[Shard]:  # fmt: skip
        """One for each run of slabs that this rank decides; `spots` takes the bins of the scores. Local."""
        shards = []
        for i, (run, rows) in enumerate(zip(self.placed.owned(x.name), weights, strict=True)):
            scores = metric.block_scores(rows, heard[i] if heard is not None else None).float()
            if metric.stays_removed:
                scores = scores.masked_fill(run.removed, -torch.inf)
            if spots is not None:
                spots.append(seen.bins(scores))
            shards.append(Shard(x.setting.name, x.base + run.first_block, scores, x.cost))
        return shards

    def masks(self) -> dict[str, torch.Tensor]:
        """{parameter: bool, True = keep}, broadcastable to what this rank holds of it. Local."""
        if self.decided is None:
            return {x.name: torch.ones([1] * len(x.blocks.shape), dtype=torch.bool) for x in self.tensors()}
        return {x.name: self.decided.spread(x.name, ~self.removed[x.name]) for x in self.tensors()}

    def decays(self, metrics: Mapping[str, Metric]) -> dict[str, tuple[torch.Tensor, float]]:
        """{parameter: (bool, True = keep, factor of the latent)} where gradients of masked weights stay."""
        masks = self.masks()
        return {
            x.name: (masks[x.name], decay)
            for x in self.tensors()
            if (decay := metrics[x.setting.name].masked_decay) is not None
        }

    def given(self, tensors: Sequence[BlockTensor]) -> float:
        """Fraction of the cost of a group that is removed."""
        gone = sum(self.num_removed(t) * t.cost for t in tensors)
        return gone / sum(t.num * t.cost for t in tensors)


def _by_rows(setting: Setting) -> bool:
    """Whether single weights can compete in each row: nothing else is asked for."""
    asked = setting.sparse_threshold is not None or setting.global_group_id is not None
    return setting.granularity == "element" and setting.target == "weight" and not asked


def _has_ratio(tensor: BlockTensor) -> bool:
    return tensor.setting.sparse_threshold is None and not tensor.in_runs


def _target(tensors: Sequence[BlockTensor], fraction: float) -> tuple[int, dict[str, tuple[int, int]]]:
    """(cost to remove, bounds in blocks by target) of a group. Raises UserError when the bounds forbid the ratio."""
    setting = tensors[0].setting
    ratio = share(setting.sparse_ratio, fraction)
    if setting.global_group_id is None:
        return math.floor(ratio * tensors[0].num) * tensors[0].cost, {}
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
    bounds = {t.setting.name: count_bounds(t.num, t.setting, fraction) for t in tensors}
    low, high = (sum(bounds[t.setting.name][k] * t.cost for t in tensors) for k in (0, 1))
    free = all(bounds[t.setting.name] == (0, t.num) for t in tensors)
    return min(max(math.ceil(ratio * total), low), high), {} if free else bounds


def _by_threshold(tensor: BlockTensor, fraction: float) -> Callable[[int], int]:
    """The cost to remove, from how many blocks are below the threshold."""
    return lambda below: threshold_count(below, tensor.num, tensor.setting, fraction) * tensor.cost


def _in_runs(tensor: BlockTensor, shard: Shard, fraction: float) -> torch.Tensor:
    """bool [n]: the least important of each run, a row or M consecutive weights, as many as are due. Local."""
    size = tensor.blocks.group
    if tensor.setting.pattern:
        keep, of = tensor.setting.pattern
        count = math.floor(share(of - keep, fraction))
    else:
        count = math.floor(share(tensor.setting.sparse_ratio, fraction) * size)
    index = shard.base + torch.arange(len(shard.scores), device=shard.scores.device)
    by_tie = tie_key(index).view(-1, size).argsort(1)
    order = by_tie.gather(1, score_key(shard.scores).view(-1, size).gather(1, by_tie).argsort(stable=True, dim=1))
    gone = torch.zeros_like(order, dtype=torch.bool)
    return gone.scatter_(1, order[:, :count], True).flatten()
