"""When decisions fall, and the curves, by hand-computed values."""

import pytest

from dist_compress.config import ScheduleConfig
from dist_compress.errors import UserError
from dist_compress.pruning.schedule import decisions


def half(progress: float) -> float:
    return progress / 2


def falling(progress: float) -> float:
    return 1 - progress


def at(name="linear", start=0.0, end=0.0, num=1, total=100, per_epoch=10.0, driven="", ratio=0.0):
    return decisions(ScheduleConfig(name, start, end, num), total, per_epoch, driven, ratio)


def test_one_shot_decides_once_at_the_later_of_start_and_end():
    assert at("one_shot") == {0: 1.0}
    assert at("one_shot", start=0.3) == {30: 1.0}
    assert at("one_shot", start=0.1, end=0.3) == {30: 1.0}


def test_linear_and_agp():
    assert at("linear", 0.1, 0.5, 5) == {10: 0.2, 20: 0.4, 30: 0.6, 40: 0.8, 50: 1.0}
    agp = at("agp", 0.1, 0.5, 5)
    assert list(agp) == [10, 20, 30, 40, 50]
    assert list(agp.values()) == pytest.approx([0.488, 0.784, 0.936, 0.992, 1.0])


def test_exponential_removes_the_same_share_of_what_is_left():
    plan = at("exponential", 0.1, 0.5, 4, ratio=0.9375)  # a sixteenth is left: each decision leaves one half
    assert [1 - 0.9375 * f for f in plan.values()] == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])
    left = [1.0, *(1 - 0.8 * f for f in at("exponential", 0.1, 0.5, 5, ratio=0.8).values())]
    assert [b / a for a, b in zip(left, left[1:], strict=False)] == pytest.approx([0.2 ** (1 / 5)] * 5)
    assert at("exponential", 0.1, 0.5, 5) == at("linear", 0.1, 0.5, 5)  # no ratio: thresholds only


def test_steps_and_epochs():
    assert list(at("linear", "5steps", "2epochs", 4)) == [5, 10, 15, 20]
    assert list(at("linear", "4steps", "9steps", 3)) == [4, 6, 9]  # 6.5 rounds to even


def test_a_run_of_four_steps_reaches_the_target():
    plan = at("agp", 0.1, 0.6, 6, total=4)
    assert list(plan) == [0, 1, 2] and plan[2] == 1.0  # 0, .4, .8, 1.2, 1.6, 2: those that coincide collapse
    assert plan[0] == pytest.approx(1 - (1 - 2 / 6) ** 3) and plan[1] == pytest.approx(1 - (1 - 4 / 6) ** 3)


def test_gradients_need_a_step():
    assert list(at("agp", 0.1, 0.6, 6, total=4, driven="taylor")) == [1, 2]
    assert at("one_shot", end=0.01, total=4, driven="taylor") == {1: 1.0}
    for keys in ({"start": 0.0, "end": 0.5, "num": 3}, {"name": "one_shot"}, {"start": 0.5, "end": 0.5, "total": 0}):
        with pytest.raises(UserError, match="pruning.schedule.start=0.* taylor .* pruning.schedule.start=1steps"):
            at(**keys, driven="taylor")


def test_own_curve():
    here = f"{__name__}.half"
    import sys

    sys.modules.setdefault(__name__, sys.modules[half.__module__])
    assert at(here, 0.1, 0.2, 2) == {10: 0.25, 20: 1.0}  # the last one spends everything
    with pytest.raises(UserError, match="fractions must not fall"):
        at(f"{__name__}.falling", 0.1, 0.2, 3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "cubic"}, "pruning.schedule.name='cubic': no such schedule. Allowed: one_shot, linear, agp, expo"),
        ({"name": "no_such_pkg.f"}, "pruning.schedule.name='no_such_pkg.f': No module named"),
        ({"name": "math.no"}, "pruning.schedule.name='math.no'"),
        ({"name": "math.cosh"}, "is not a fraction"),
        ({"start": 0.5, "end": 0.2, "num": 2}, "pruning.schedule.end=0.2 (step 20) lies before start=0.5 (step 50)"),
        ({"end": "101steps"}, "the last decision lies at step 101, but the run has 100"),
        ({"name": "one_shot", "num": 2}, "pruning.schedule.num_decisions=2: one_shot decides once"),
        ({"end": 5}, "pruning.schedule.end=5 is no duration"),
    ],
)
def test_refusals(keys, said):
    with pytest.raises(UserError) as error:
        at(**keys)
    assert said in str(error.value)
