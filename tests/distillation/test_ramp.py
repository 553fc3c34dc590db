"""Values that change over the run, by hand."""

import pytest

from dist_compress.config import RampConfig
from dist_compress.distillation.ramp import Ramp
from dist_compress.errors import UserError


def values(first: float, steps: range = range(0, 11, 2), **keys: object) -> list[float]:
    ramp = Ramp(first, RampConfig(**keys), "distillation.weight_ramp", 10, 5.0)  # type: ignore[arg-type]
    return [ramp(step) for step in steps]


def test_linear_and_cosine():
    assert values(1.0) == [1.0] * 6
    assert values(4.0, to=2.0) == pytest.approx([4.0, 3.6, 3.2, 2.8, 2.4, 2.0])
    assert values(0.0, to=1.0, start=0.2, end="1.2epochs") == pytest.approx([0, 0, 0.5, 1, 1, 1])
    assert values(0.0, to=1.0, name="cosine") == pytest.approx([0, 0.0954915, 0.3454915, 0.6545085, 0.9045085, 1])
    assert values(1.0, to=2.0, start="4steps", end="4steps") == [1, 1, 2, 2, 2, 2]  # a jump


def test_an_end_before_the_start_is_refused():
    said = r"distillation.weight_ramp.end=0.1 \(step 1\) lies before start=0.5 \(step 5\)"
    with pytest.raises(UserError, match=said):
        values(1.0, to=0.0, start=0.5, end=0.1)
