"""Which blocks are removed, kept by those who hold the weights.

A rank decides the slabs that it owns and hears of the others that it holds, as packed bits (see `ownership`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_compress import comm
from dist_compress.blocks import Blocks
from dist_compress.exchange import Exchange, Span
from dist_compress.layout import Layout, Run
from dist_compress.pruning.ownership import shares


@dataclass(frozen=True)
class OwnedRun:
    """Consecutive slabs of one tensor that this rank decides."""

    start: int  # in weights of the parameter, flattened
    end: int
    first_block: int
    part: Blocks  # these slabs as a tensor of their own
    removed: torch.Tensor  # bool [blocks], so far

    def rows(self, flat: torch.Tensor) -> torch.Tensor:
        """[blocks, weights of a block] of the weights, or of anything there is of each."""
        return self.part.rows(flat.view(self.part.shape))


class Removed:
    """`bits`: {parameter: bool}, of the blocks in the slabs that this rank holds, in order; all of them where it holds
    the whole parameter. `counts`: {parameter: number of removed blocks}, over all ranks."""

    def __init__(self, blocks: Mapping[str, Blocks], layout: Layout) -> None:
        """Nothing is removed yet. Local."""
        self.blocks, self.layout = dict(blocks), layout
        self.slab = {name: b.slab for name, b in blocks.items()}
        self.shares = {name: shares(b, name, turn, layout) for turn, (name, b) in enumerate(blocks.items())}
        self.bits = {
            name: torch.zeros(_total(self._held(name)), dtype=torch.bool, device=layout.device(name))
            for name in blocks
        }
        self.counts = dict.fromkeys(blocks, 0)
        owned = {name: [self._in_blocks(name, runs) for runs in s.owned] for name, s in self.shares.items()}
        held = {name: [self._in_blocks(name, runs) for runs in s.held] for name, s in self.shares.items()}
        ranks = range(comm.world_size())
        self._back = Exchange(owned, [[Span(n, a, a + k) for n in held for a, k in held[n][rank]] for rank in ranks])
        self._owned = owned

    def weights(self, name: str, rank: int) -> list[Run]:
        """The weights that `rank` decides, whole slabs."""
        return [(first * self.slab[name], count * self.slab[name]) for first, count in self.shares[name].owned[rank]]

    def owned(self, name: str) -> list[OwnedRun]:
        """What this rank decides of a tensor."""
        slab, each = self.slab[name], self.slab[name] // self.blocks[name].size
        return [
            OwnedRun(
                first * slab, (first + count) * slab, first * each, self.blocks[name].slabs(count),
                _cut(self.bits[name], self._held(name), (first * each, count * each)),
            )
            for first, count in self.shares[name].owned[comm.rank()]
        ]  # fmt: skip

    def tell(self, decided: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Hand on what this rank decided: for each run of `owned` bool [blocks], old and new. Collective.

        Tensors that are not named stay as they are. `counts` are those of before until they are summed."""
        flat = {name: self._joined(name, decided.get(name) or self._owned_bits(name)) for name in self.blocks}
        found = iter(self._back.move(self._back.pick(flat.__getitem__), flat.__getitem__, packed=True))
        self.bits = {name: self._joined(name, [next(found) for _ in self._held(name)]) for name in self.blocks}

    def hand_out(self, decided: Mapping[str, torch.Tensor], owner: Mapping[str, int]) -> None:
        """As `tell`, of tensors that one rank decides as a whole: `decided` has bool [num blocks] of those this rank
        owns, `owner` says who owns which. Collective."""
        ranks = range(comm.world_size())
        holdings = {n: [[(0, self.blocks[n].num)] if r == o else [] for r in ranks] for n, o in owner.items()}
        held = {n: [self._in_blocks(n, runs) for runs in self.shares[n].held] for n in owner}
        exchange = Exchange(holdings, [[Span(n, a, a + k) for n in owner for a, k in held[n][r]] for r in ranks])
        found = iter(exchange.move(exchange.pick(decided.__getitem__), self.bits.__getitem__, packed=True))
        self.bits |= {name: self._joined(name, [next(found) for _ in self._held(name)]) for name in owner}

    def spread(self, name: str, bits: torch.Tensor) -> torch.Tensor:
        """Bool [blocks that this rank holds] -> bool of the shape of what it holds of the parameter. Local."""
        blocks, slab = self.blocks[name], self.slab[name]
        if self.layout.is_whole(name):
            return blocks.spread(bits)
        held = self.shares[name].held[comm.rank()]
        pieces = bits.split([count for _, count in self._held(name)])
        flat = [blocks.slabs(n).spread(piece).flatten() for (_, n), piece in zip(held, pieces, strict=True)]
        weights = [(first * slab, count * slab) for first, count in held]
        wide = self._joined(name, flat)
        own = [_cut(wide, weights, run) for run in self.layout.runs(name, comm.rank()) if run[1]]
        return self._joined(name, own).view(self.layout.local(name).shape)

    def gather(self, wants: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        """{parameter: bool [num blocks]} of the tensors `wants[rank]`. Collective unless all ranks hold them whole."""
        named = dict.fromkeys(name for names in wants for name in names)
        spans = [[Span(name, 0, self.blocks[name].num) for name in names] for names in wants]
        if all(self.layout.is_whole(name) for name in named):
            return {name: self.bits[name] for name in wants[comm.rank()]}
        exchange = Exchange({name: self._owned[name] for name in named}, spans)
        flat = {name: self._joined(name, self._owned_bits(name)) for name in named}
        found = exchange.move(exchange.pick(flat.__getitem__), flat.__getitem__, packed=True)
        return dict(zip(wants[comm.rank()], found, strict=True))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{parameter: bool [num blocks]}, the same on every rank and at any number of ranks. Collective unless every
        rank holds everything."""
        return self.gather([list(self.blocks)] * comm.world_size())

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Local."""
        for name, old in self.bits.items():
            own = [state[name][first : first + count].to(old.device) for first, count in self._held(name)]
            self.bits[name] = self._joined(name, own)
        self.counts = {name: int(state[name].sum()) for name in self.bits}

    def own_counts(self) -> torch.Tensor:
        """int64 [tensors]: what of `counts` this rank decides. Local."""
        own = [sum(int(bits.sum()) for bits in self._owned_bits(name)) for name in self.blocks]
        return torch.tensor(own, dtype=torch.int64)

    def set_counts(self, total: torch.Tensor) -> None:
        """`total`: the sum of `own_counts` over the ranks. Local."""
        self.counts = dict(zip(self.blocks, total.tolist(), strict=True))

    def _owned_bits(self, name: str) -> list[torch.Tensor]:
        return [run.removed for run in self.owned(name)]

    def _in_blocks(self, name: str, slabs: Sequence[Run]) -> list[Run]:
        each = self.slab[name] // self.blocks[name].size
        return [(first * each, count * each) for first, count in slabs]

    def _held(self, name: str) -> list[Run]:
        return self._in_blocks(name, self.shares[name].held[comm.rank()])

    def _joined(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0] if len(parts) == 1 else torch.cat([self.bits[name][:0], *parts])


def _total(runs: Sequence[Run]) -> int:
    return sum(count for _, count in runs)


def _cut(flat: torch.Tensor, runs: Sequence[Run], part: Run) -> torch.Tensor:
    """Of what lies in `flat`, run by run, that of `part`, which lies in one of them."""
    at = 0
    for first, count in runs:
        if first <= part[0] < first + count:
            return flat[at + part[0] - first : at + part[0] - first + part[1]]
        at += count
    raise AssertionError(f"{part} is not held")
