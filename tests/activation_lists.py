"""Entries of config lists about activations, drawn at random, and the values that all drawn entries share."""

from __future__ import annotations

import random
from typing import Any

from activation_reference import Entry

RATIOS = (0.1, 0.25, 0.3, 0.5, 0.6, 0.75)
FREE_OF_GROUPS = {"global_group_id": None, "min_sparse_ratio": None, "max_sparse_ratio": None}


def method(rng: random.Random) -> Entry:
    return rng.choice([{}, {}, {"method": "l1_norm"}, {"method": "l2_norm"}])


def how_much(rng: random.Random, scale: float = 1.0) -> Entry:
    if rng.random() < 0.7:
        return {"sparse_ratio": rng.choice(RATIOS), **FREE_OF_GROUPS}
    bounds = rng.choice(
        [{}, {"max_sparse_ratio": 0.5}, {"min_sparse_ratio": 0.3}, {"min_sparse_ratio": 0.2, "max_sparse_ratio": 0.4}]
    )
    return {**FREE_OF_GROUPS, "sparse_threshold": scale * rng.choice([0.0, 0.1, 0.3, 2.0]), **bounds}


# Their scores are all different (some inputs of `head` are always zero, so they would tie).
SITES = {
    "stem._output_0": (8, 4, 4), "bn._input_0": (8, 4, 4), "bn._output_0": (8, 4, 4), "a._input_0": (8, 4, 4),
    "a._output_0": (6, 4, 4), "bn_a._output_0": (6, 4, 4), "b._input_0": (6, 4, 4), "bn_b._input_0": (8, 4, 4),
    "bn_b._output_0": (8, 4, 4), "depthwise._output_0": (8, 2, 2), "free._output_0": (10, 2, 2),
    "free._input_0": (8, 2, 2), "head._output_0": (5,),
}  # fmt: skip
APPLIED: list[Entry] = [{}, {}, {"apply_method": "mul"}, {"apply_method": "add", "apply_options": {"constant": -5}}]


def activations(rng: random.Random) -> list[Entry]:
    """Targets that are activations: alone, in groups, aligned; under any of their names."""
    left = list(SITES)
    rng.shuffle(left)
    entries = []
    for path in [left.pop() for _ in range(rng.randint(1, 3))]:
        if rng.random() < 0.5:
            entries.append(_site(rng, path, sparse_ratio=rng.choice(RATIOS)))  # overridden by the next
        entries.append(_site(rng, path, **_one_activation(rng, SITES[path])))
        if rng.random() < 0.4:
            fit = [p for p in left if SITES[p][0] == SITES[path][0]]
            if fit:
                left.remove(fit[0])
                align = {"module_name": path.partition(".")[0], "target_name": rng.choice(_names(path))}
                align["dims"] = [rng.choice([1, -len(SITES[path])])]
                entries.append(_site(rng, fit[0], align=align))
    if rng.random() < 0.3:
        module = rng.choice(["bn_b", "b", "a"])
        if not any(module in entry["op_names"] for entry in entries):
            both = {"op_names": [module], "target_names": ["_output_0", "_input_input"], "sparse_ratio": 0.25}
            entries.append({**both, "target_settings": {"_output_": {"sparse_ratio": 0.5}, "_input_0": method(rng)}})
            left = [path for path in left if not path.startswith(f"{module}.")]
    if rng.random() < 0.4:
        group = {"global_group_id": "acts", "sparse_ratio": rng.choice(RATIOS[:4]), "granularity": "per_channel"}
        bounds = rng.choice([{}, {"min_sparse_ratio": 0.1, "max_sparse_ratio": 0.8}])
        entries += [_site(rng, left.pop(), **group, **bounds) for _ in range(min(len(left), 2))]
    if rng.random() < 0.3:
        pairs = [(x, y) for x in left for y in left if x < y and SIZE_OF[x] == SIZE_OF[y]]
        keys = {"dependency_group_id": "same", **method(rng), "sparse_ratio": rng.choice(RATIOS)}
        entries += [_site(rng, path, **keys) for path in (rng.choice(pairs) if pairs else ())]
    return entries


SIZE_OF = {path: shape[0] for path, shape in SITES.items()}


def _names(path: str) -> list[str]:
    return ["_input_", "_input_0", "_input_input"] if "_input_" in path else ["_output_", "_output_0"]


def _site(rng: random.Random, path: str, **keys: Any) -> Entry:
    return {
        "op_names": [path.partition(".")[0]],
        "target_names": [rng.choice(_names(path))],
        **rng.choice(APPLIED),
        **keys,
    }


def _one_activation(rng: random.Random, shape: tuple[int, ...]) -> Entry:
    blocks = ["element", [2, 2], [2, 1, 2], [[2], "back", -1], [-1, -1]] if len(shape) == 3 else ["element", [5]]
    kind = rng.choice(["default", "per_channel", *[b for b in blocks if _fits(b, shape)]])
    entry = {"granularity": kind, **method(rng), **how_much(rng, rng.choice([30.0, 300.0]))}
    parts = [p for p in (2, 3, 5) if shape[0] % p == 0 and p < shape[0]]
    if "sparse_ratio" in entry and kind in ("default", "per_channel") and parts and rng.random() < 0.4:
        entry["internal_metric_block"] = rng.choice(parts)
    return entry


def _fits(block: Any, shape: tuple[int, ...]) -> bool:
    sizes = block[0] if isinstance(block, list) and isinstance(block[0], list) else None
    if sizes is not None:
        return shape[0] % sizes[0] == 0
    return block == "element" or all(n % k == 0 for n, k in zip(shape[::-1], block[::-1], strict=False) if k > 0)
