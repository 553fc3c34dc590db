"""Clipping ranges from histograms, against brute force on the values themselves."""

from __future__ import annotations

import torch

from dist_compress.quantization import affine, dtypes
from dist_compress.quantization.granularity import PerTensor
from dist_compress.quantization.histogram import BINS, Histogram, entropy, mse, percentile
from dist_compress.quantization.observer import reduce


def values(seed: int, outlier: float, one_sided: bool = False) -> torch.Tensor:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(seed))
    x[:3] = torch.tensor([outlier, outlier, -outlier])
    return x.relu() if one_sided else x


def seen(x: torch.Tensor, search) -> tuple[float, float]:
    observer = Histogram(PerTensor(), x.shape, search=search)
    observer.fold(observer.measure(x))
    reduce([observer])
    low, high = observer.range()
    return low.item(), high.item()


def test_percentile_is_the_edge_of_the_bin_of_the_quantile():
    x = values(0, 30.0)
    for keep in (0.9, 0.99, 0.999):
        low, high = seen(x, percentile(keep))
        width = 32.0 / BINS
        wanted = x.sort().values
        assert 0 <= high - wanted[int(keep * len(x)) - 1] <= width * 1.001
        assert 0 <= wanted[len(x) - int(keep * len(x))] - low <= width * 1.001
    assert seen(x, percentile(1.0)) == (x.min().item(), x.max().item())


def test_percentile_of_values_of_one_sign_has_zero_as_its_end():
    low, high = seen(values(0, 30.0).abs() + 1, percentile(0.99))
    assert low == 0 or low >= 1  # qparams extend to zero whatever it is
    assert 1 < high < 10


def test_mse_is_that_of_brute_force():
    for name, scheme, one_sided in (("int4", "symmetric", False), ("int4", "affine", True), ("int8", "affine", False)):
        dtype = dtypes.find(name, scheme, "")
        x = values(1, 12.0, one_sided)
        low, high = seen(x, mse(dtype, scheme))

        def error(k: int) -> float:
            ends = x.min() * k / 100, x.max() * k / 100  # noqa: B023
            scale, zero = affine.qparams(*ends, dtype, scheme)  # noqa: B023
            return float((x - affine.fake_quantize(x, scale, zero, dtype)).double().square().sum())  # noqa: B023

        best = min(map(error, range(1, 101)))
        chosen = round(100 * high / x.max().item())
        assert error(chosen) <= best * 1.02, (chosen, name)
        assert error(chosen) < 0.9 * error(100) or name == "int8"


def test_entropy_clips_what_is_rare():
    dtype = dtypes.find("int8", "symmetric", "")
    low, high = seen(values(2, 100.0), entropy(dtype, "symmetric"))
    assert 3 < high < 20 and low == -high
    x = torch.linspace(-1, 1, 20001)
    low, high = seen(x, entropy(dtype, "symmetric"))
    assert high > 0.95  # nothing is rare here
