"""Observers: equal bits at any number of ranks and any split of the batch, two collectives, no data, no number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dist_compress import comm
from dist_compress.quantization import dtypes, histogram
from dist_compress.quantization.granularity import PerChannel, PerTensor
from dist_compress.quantization.observer import MovingAverage, Observer, reduce

STEPS, MICROS, SHAPE = 5, 6, (4, 3, 5)
KINDS = ["extent", "channels", "average", "percentile", "mse", "entropy"]


def make(kind: str) -> Observer:
    int8 = dtypes.find("int8", "affine", "")
    searches: dict[str, Callable] = {
        "percentile": histogram.percentile(0.99),
        "mse": histogram.mse(int8, "affine"),
        "entropy": histogram.entropy(int8, "affine"),
    }
    if kind in searches:
        return histogram.Histogram(PerTensor(), SHAPE, search=searches[kind])
    if kind == "channels":
        return histogram.Histogram(PerChannel(1), SHAPE, search=searches["percentile"])
    return MovingAverage(PerTensor(), SHAPE) if kind == "average" else Observer(PerChannel(1), SHAPE)


def batch(step: int, micro: int) -> torch.Tensor:
    """Of growing spread, with single outliers: what a shortcut would get wrong."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    x = torch.randn(SHAPE, generator=generator) * 1.7**step
    x[0, 0, 0] *= 20.0 * (micro == 4)
    return x


def observed(kind: str, micros: list[int]) -> Observer:
    """The observer after all steps, of which this rank sees `micros`."""
    observer = make(kind)
    for step in range(STEPS):
        for micro in micros:
            observer.fold(observer.measure(batch(step, micro)))
        reduce([observer])
    return observer


def state_of(observer: Observer) -> dict[str, list]:
    low, high = observer.range()
    return {k: v.tolist() for k, v in observer.state_dict().items()} | {"range": [low.tolist(), high.tolist()]}


def states(uneven: bool) -> dict[str, dict]:
    own = list(range(comm.rank(), MICROS, comm.world_size()))
    if uneven and comm.world_size() > 1:  # rank 0 sees nothing, the last one almost everything
        own = [] if comm.rank() == 0 else [MICROS - 1] if comm.rank() == 1 else []
        if comm.rank() == comm.world_size() - 1:
            own = sorted({*own, *range(MICROS - 1)})
    return {kind: state_of(observed(kind, own)) for kind in KINDS}


@pytest.mark.parametrize("uneven", [False, True])
def test_states_have_equal_bits_at_any_number_of_ranks(ranks, uneven):
    one = ranks(1, states, uneven)[0]
    for n in (2, 3, 4):
        for found in ranks(n, states, uneven):
            assert found == one, n
    assert len({str(one[kind]["range"]) for kind in KINDS}) == len(KINDS)  # each says something of its own


def test_one_large_batch_is_many_small_ones():
    for kind in KINDS:
        whole = make(kind)
        for step in range(STEPS):
            whole.fold(whole.measure(torch.cat([batch(step, micro) for micro in range(MICROS)])))
            reduce([whole])
        assert state_of(whole) == state_of(observed(kind, list(range(MICROS))))


def test_values_by_hand():
    extent, average = Observer(PerTensor(), [2]), MovingAverage(PerTensor(), [2], momentum=0.5)
    for low, high in ((-1.0, 2.0), (-3.0, 1.0), (0.0, 10.0)):
        for observer in (extent, average):
            observer.fold(observer.measure(torch.tensor([low, high])))
            reduce([observer])
    assert [x.item() for x in extent.range()] == [-3.0, 10.0]
    assert [x.item() for x in average.range()] == [-1.0, 5.75]  # ((-1 - 3) / 2 + 0) / 2, ((2 + 1) / 2 + 10) / 2
    assert extent.counts.tolist() == [6, 0]


def count_calls(num_observers: int) -> dict[str, int]:
    observers = [make(KINDS[i % len(KINDS)]) for i in range(num_observers)]
    for observer in observers[: 150 + 50 * comm.rank()]:  # what a rank did not see changes nothing
        observer.fold(observer.measure(batch(0, comm.rank())))
    comm.calls.clear()
    reduce(observers)
    return dict(comm.calls)


def test_two_collectives_for_two_hundred_observers(ranks):
    assert ranks(2, count_calls, 200) == [{"all_reduce": 2}, {"all_reduce": 2}]


def test_nobody_has_data_and_the_range_stays():
    for kind in KINDS:
        observer = make(kind)
        reduce([observer])
        assert observer.empty
        observer.fold(observer.measure(batch(0, 0)))
        reduce([observer])
        before = state_of(observer)
        reduce([observer])
        assert not observer.empty and state_of(observer) == before


def test_what_is_no_number_is_counted_and_left_out():
    for kind in KINDS:
        clean, dirty = make(kind), make(kind)
        x = batch(2, 0)
        clean.fold(clean.measure(x))
        bad = torch.tensor([float("nan"), float("inf"), float("-inf")]).view(1, 3, 1).expand(1, 3, 5)
        dirty.fold(dirty.measure(torch.cat([x, bad])))
        reduce([clean, dirty])
        assert dirty.counts.tolist() == [75, 15] and clean.counts.tolist() == [60, 0]
        assert [r.tolist() for r in dirty.range()] == [r.tolist() for r in clean.range()]


def test_bins_that_grew_are_those_of_the_final_range():
    grown, final = histogram.Histogram(PerTensor(), [1]), histogram.Histogram(PerTensor(), [1])
    parts = [torch.randn(500, generator=torch.Generator().manual_seed(i)) * 3.0**i for i in range(-9, 9)]
    for part in parts:
        grown.fold(grown.measure(part))
        reduce([grown])
    for part in reversed(parts):
        final.fold(final.measure(part))
    reduce([final])
    assert torch.equal(grown.bins, final.bins) and torch.equal(grown.exponent, final.exponent)
    edges = torch.arange(-histogram.BINS, histogram.BINS + 1).double() * 2.0 ** int(grown.exponent) / histogram.BINS
    wanted = torch.histogram(torch.cat(parts).double(), edges).hist
    assert torch.equal(grown.bins[0].double(), wanted)


def torchs_observers() -> tuple[float, float]:
    """[low, high] of torch.ao's MinMaxObserver of a net wrapped by DDP, on this rank."""
    from torch.ao.quantization.observer import MinMaxObserver

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.observer = nn.Linear(5, 2), MinMaxObserver()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.observer(x))

    net = Net()
    wrapped = nn.parallel.DistributedDataParallel(net) if comm.world_size() > 1 else net
    for step in range(STEPS):
        for micro in range(comm.rank(), MICROS, comm.world_size()):
            wrapped(batch(step, micro))
    return float(net.observer.min_val), float(net.observer.max_val)


def test_torchs_observers_do_not_agree_which_is_what_ours_are_for(ranks):
    truth = ranks(1, torchs_observers)[0]
    found = [*ranks(2, torchs_observers), *ranks(3, torchs_observers)]
    assert len(set(found)) > 1 and any(f != truth for f in found)  # by rank and by their number
    ours = observed("extent", list(range(MICROS))).range()
    assert (float(ours[0].min()), float(ours[1].max())) == truth
