"""Config lists drawn at random: a valid one removes exactly what it demands, an invalid one is refused by its key."""

import random

import pytest
from config_lists import Wide, check, check_invalid, check_valid, draw

from dist_compress.pruning import elements, sparsity


def test_valid_lists_remove_exactly_what_the_rules_demand():
    check(check_valid, range(500))


def on_ranks(seeds):
    check(check_valid, seeds)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_valid_lists_do_so_at_any_number_of_ranks(ranks, size):
    ranks(size, on_ranks, range(2000, 2010))


def test_invalid_lists_are_refused_with_the_path_of_the_key():
    check(check_invalid, range(1000))


@pytest.mark.parametrize(
    ("module", "name"), [(elements, "threshold_count"), (sparsity, "threshold_count"), (elements, "count_bounds")]
)
def test_negative_control_one_too_many_is_seen(monkeypatch, module, name):
    right = getattr(module, name)

    def wrong(*args):
        found = right(*args)
        return found + 1 if isinstance(found, int) else (found[0], max(found[0], found[1] - 2))

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match="seed"):
        check(check_valid, range(100))


def test_the_lists_are_not_all_alike():
    seen: dict[str, int] = {}
    for seed in range(60):
        entries, _, masks = draw(random.Random(seed), Wide())
        assert sum(int((~mask).sum()) for mask in masks.values()) > 0 or seed % 10
        for key in {key for entry in entries for key, value in entry.items() if value is not None}:
            seen[key] = seen.get(key, 0) + 1
    assert (
        min(
            seen[key]
            for key in (
                "align",
                "apply_method",
                "target_names",
                "sparse_threshold",
                "internal_metric_block",
                "target_settings",
            )
        )
        >= 3
    )
    assert min(seen[key] for key in ("global_group_id", "dependency_group_id", "granularity", "op_names_re")) >= 3
