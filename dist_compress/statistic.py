"""A sum over micro-batches and steps whose bits do not depend on the number of ranks.

Each micro-batch j of the global batch has its own float64 accumulator, a slot of the rank that computes it.
Adding is local; one ordered sum of the slots at the end gives the total. (Reduced while still linear: take
roots, absolute values and ratios of the total, never of a slot.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_compress import comm


class Statistic:
    """Sum of vectors of `size` floats over the M = `num_micro` micro-batches of any number of steps."""

    def __init__(self, num_micro: int, size: int, device: torch.device | str = "cpu") -> None:
        self.num_micro, self.size = num_micro, size
        num_slots = -(-num_micro // comm.world_size())
        self._slots = torch.zeros(num_slots, size, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, micro: int, vector: torch.Tensor) -> None:
        """Add what micro-batch `micro`, one of this rank's, contributes: any float [size]. Local."""
        slot, owner = divmod(micro, comm.world_size())
        assert micro < self.num_micro and owner == comm.rank(), (micro, self.num_micro)
        self._slots[slot] += vector.detach()
        self._count += slot == 0

    def total(self) -> torch.Tensor:
        """float64 [size], the same on every rank. Collective."""
        return totals([self])[0]

    def count(self) -> int:
        """Steps added so far: the first slot is live on every rank. Local, the same on every rank."""
        return self._count

    def reset(self) -> None:
        self._slots.zero_()
        self._count = 0

    def state_dict(self) -> dict[str, Any]:
        """Every slot in micro-batch order, float64 [M, size], or [M, 0] if nothing was added; the same on every rank.
        Collective unless nothing was."""
        if not self._count:
            return {"slots": self._slots.new_zeros(self.num_micro, 0), "count": 0}
        slots = comm.all_gather(self._slots).transpose(0, 1).flatten(0, 1)[: self.num_micro]
        return {"slots": slots.contiguous(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's slots of a state saved at any number of ranks. Local."""
        self._slots.zero_()
        self._count = int(state["count"])
        if self._count:
            own = state["slots"][comm.rank() :: comm.world_size()]
            self._slots[: len(own)] = own


def totals(statistics: Sequence[Statistic]) -> list[torch.Tensor]:
    """The total of each, all by one ordered sum. They are of the same micro-batches. Collective if there are any."""
    if not statistics:
        return []
    slots = [s._slots for s in statistics]
    rows = slots[0] if len(slots) == 1 else torch.cat(slots, 1)
    return list(comm.ordered_sum(rows, statistics[0].num_micro).split([s.size for s in statistics]))
