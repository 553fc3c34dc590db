"""Config lists drawn at random, valid and invalid, and what must come of them.

python tests/config_lists.py 1000    # check 1,000 valid and 1,000 invalid ones
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from activation_lists import FREE_OF_GROUPS, RATIOS, activations, how_much, method
from activation_reference import hear, is_activation
from pruning_nets import Net, attach
from pruning_reference import Entry, Masks, expected
from torch import nn

from dist_compress import comm
from dist_compress.config import Config, merge
from dist_compress.errors import UserError


class Wide(Net):
    """The net of the pruning tests and modules beside it that the coupling knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.mat = nn.Embedding(6, 4), nn.ConvTranspose2d(4, 6, 2), nn.Linear(12, 8)
        for module in (self.emb, self.up, self.mat):
            for p in module.parameters():
                nn.init.normal_(p)


# ---- valid lists ----

BLOCKS: dict[str, list[Any]] = {
    "stem": ["element", [3, 3], [4, 1, 1, 1], [[2], "back", -1], "1:3"],
    "a": ["element", [2, 4, 3, 1], [-1, -1], [[1], "back", -1], "2:4", "3:8"],
    "b": ["element", [1, 2, 1, 3], "1:2", "2:6", [4, -1, 3, 3]],
    "depthwise": ["element", [1, -1, -1], [2, 1, 1, 1]],
    "free": ["element", [5, 2, 1, 1], "4:8", "2:4"],
    "head": ["element", [1, -1], [5, 8], [1, 4], "2:4", "1:5"],
    "emb": ["element", [2, 2], [-1, 1], "1:2"],
    "up": ["element", [2, 3, 2, 2], [2, 2], "1:4"],
    "mat": ["element", [4, 4], [2, -1], [[1], "back", -1], "2:4", "1:3"],
}
SIZES = {"stem": 8, "a": 6, "b": 8, "depthwise": 8, "free": 10, "head": 5, "emb": 4, "up": 6, "mat": 8}


def draw(rng: random.Random, model: nn.Module) -> tuple[list[Entry], Entry, Masks]:
    """A valid config list by which something can be pruned, the other keys of the section, and the masks it demands."""
    while True:
        entries, keys = _draw(rng)
        masks, decided = expected(entries, keys["sparse_ratio"], model)
        if decided:
            return entries, keys, masks


def _draw(rng: random.Random) -> tuple[list[Entry], Entry]:
    keys: Entry = {"sparse_ratio": rng.choice(RATIOS[:4])}
    left = list(BLOCKS)
    rng.shuffle(left)
    entries = _coupled(rng, left)
    coupled = bool(entries)
    if rng.random() < 0.4:
        entries.append(_group(rng, left))
    if rng.random() < 0.4:
        entries += _global_blocks(rng, left)
    for name in left[: rng.randint(0, 4)]:
        entries.append({"op_names": [name], **_alone(rng, name, coupled)})
    if rng.random() < 0.4:
        entries += _aligned(rng, [n for n in left[4:]], coupled)
    if rng.random() < 0.5:
        entries += activations(rng)
    return entries or [{"op_names": ["free"]}], keys


def _coupled(rng: random.Random, left: list[str]) -> list[Entry]:
    """Channels as the trace couples them, in a global group or not. Modules may leave it later on."""
    if rng.random() < 0.3:
        return []
    entry: Entry = rng.choice(
        [
            {"op_types": ["Conv2d"]},
            {"op_names": ["stem", "b", "a"]},
            {"op_names_re": ["fr", "a$"]},
            {"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["free"]},
            {"op_names": ["b"], "granularity": "in_channel"},
        ]
    )
    entry = {**entry, **method(rng)}
    if rng.random() < 0.7:
        entry["sparse_ratio"] = rng.choice(RATIOS[:4])
    elif rng.random() < 0.5:
        entry |= {"sparse_threshold": rng.choice([1.0, 5.0, 9.0]), "max_sparse_ratio": 0.6}
    if "sparse_threshold" not in entry and rng.random() < 0.5:
        entry |= {"global_group_id": "all", "sparse_ratio": rng.choice(RATIOS[:4])}
        if rng.random() < 0.5:
            entry |= {"min_sparse_ratio": 0.1, "max_sparse_ratio": 0.8}
    elif "sparse_threshold" not in entry and rng.random() < 0.3:
        entry["internal_metric_block"] = 2
        entry = entry if "op_types" not in entry else {**entry, "op_types": ["Conv2d"], "exclude_op_names": []}
    before = {**entry, "sparse_ratio": 0.2} if "sparse_ratio" in entry and rng.random() < 0.3 else None
    return [before, entry] if before else [entry]


def _alone(rng: random.Random, name: str, coupled: bool) -> Entry:
    """One target that is decided for itself. A bias cannot, when the trace couples what it follows."""
    kind, entry = rng.choice(["units", "blocks", "blocks", "targets"]), {**method(rng)}
    if kind == "units":
        entry |= {
            "granularity": rng.choice(["out_channel", "default"]),
            "dependency_group_id": rng.choice([None, "none"]),
        }
        entry |= {**how_much(rng, 5.0), "internal_metric_block": None}
        parts = [p for p in (2, 3, 4, 5) if SIZES[name] % p == 0 and p < SIZES[name]]
        if "sparse_ratio" in entry and parts and rng.random() < 0.5:
            entry["internal_metric_block"] = rng.choice(parts)
    else:
        entry |= {"granularity": rng.choice(BLOCKS[name]), "dependency_group_id": None, "internal_metric_block": None}
        pattern = ":" in entry["granularity"]
        entry |= {**FREE_OF_GROUPS, "sparse_ratio": None, "sparse_threshold": None} if pattern else how_much(rng)
        if kind == "targets" and name not in ("stem", "emb") and not (coupled and name in ("a", "depthwise")):
            bias = {
                "granularity": rng.choice(["element", "out_channel"]),
                "sparse_ratio": rng.choice(RATIOS),
                **FREE_OF_GROUPS,
            }
            entry["target_settings"] = {"bias": bias}
            if rng.random() < 0.3 and not coupled:
                entry["target_names"] = rng.choice([["bias"], ["weight", "bias"]])
    return entry


def _group(rng: random.Random, left: list[str]) -> Entry:
    """Two modules that share a mask by index."""
    pairs = [(x, y) for x in left for y in left if x < y and SIZES[x] == SIZES[y]]
    names = list(rng.choice(pairs))
    for name in names:
        left.remove(name)
    entry = {"op_names": names, "dependency_group_id": rng.choice(["pair", 3]), **method(rng), **how_much(rng, 5.0)}
    entry["internal_metric_block"] = 2 if "sparse_ratio" in entry and rng.random() < 0.4 else None
    return {**entry, "granularity": "out_channel", "method": "l1_norm"}


def _global_blocks(rng: random.Random, left: list[str]) -> list[Entry]:
    """Targets whose blocks are ranked against each other."""
    granularity = rng.choice(["element", "element", [[1], "back", -1], [2, 1]])
    fit = [n for n in left if granularity != [2, 1] or n in ("emb", "up", "mat")]
    names = fit[: rng.randint(1, 3)]
    for name in names:
        left.remove(name)
    if not names:
        return []
    entry = {
        "op_names": names,
        "granularity": granularity,
        "global_group_id": 7,
        "sparse_ratio": rng.choice(RATIOS[:4]),
    }
    entry |= {"method": "l1_norm", "dependency_group_id": None, "internal_metric_block": None}
    bounds = rng.choice([{}, {"max_sparse_ratio": 0.8, "min_sparse_ratio": 0.1}])
    entries = [entry | {"min_sparse_ratio": None, "max_sparse_ratio": None} | bounds]
    if rng.random() < 0.5:
        entries.append({"op_names": names[:1], "max_sparse_ratio": 0.9})
    return [{"op_names": names, "global_group_id": None}, *entries]


def _aligned(rng: random.Random, left: list[str], coupled: bool) -> list[Entry]:
    """A parameter that follows another one that has a mask."""
    if not left:
        return []
    source = left.pop()
    size = SIZES[source]
    made = {"op_names": [source], **_alone(rng, source, coupled)}
    made.pop("target_names", None)
    fit = [n for n in [*left, "bn", "bn_a", "bn_b"] if {**SIZES, "bn": 8, "bn_a": 6, "bn_b": 8}[n] == size]
    if not fit:
        return [made]
    dim = 1 if source in ("emb", "up") else 0
    align = {"module_name": source, "target_name": "weight", "dims": [dim]}
    taken = {"internal_metric_block": None, "dependency_group_id": None, **FREE_OF_GROUPS}
    entry = {"op_names": [rng.choice(fit)], "align": align, "granularity": None, **taken}
    if rng.random() < 0.3 and not entry["op_names"][0].startswith("bn"):
        entry["granularity"] = [[1], "back", -1]
        entry["granularity"] = None if entry["op_names"][0] in ("emb", "up") else entry["granularity"]
    return [made, entry]


# ---- invalid lists ----

Break = tuple[Entry, str]  # an entry that is wrong, and the path of the key that its message must hold
_BY_INPUT = {"module_name": "free", "target_name": "weight", "dims": [1]}
_BAD: list[Break] = [
    ({"op_types": ["Conv2d"], "sparse_ratio": 1}, "sparse_ratio"),
    ({"op_types": ["Conv2d"], "sparse_ratio": -0.1}, "sparse_ratio"),
    ({"op_types": ["Conv2d"], "sparse_ratio": "half"}, "sparse_ratio"),
    ({"op_types": ["Conv2d"], "max_sparse_ratio": 1.1}, "max_sparse_ratio"),
    ({"op_types": ["Conv2d"], "min_sparse_ratio": [0.1]}, "min_sparse_ratio"),
    ({"op_names": ["mat"], "min_sparse_ratio": 0.7, "max_sparse_ratio": 0.6}, "min_sparse_ratio"),
    ({"op_names": ["mat"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.4, "global_group_id": None}, "sparse_ratio"),
    ({"op_types": ["Conv2d"], "sparse_threshold": float("nan")}, "sparse_threshold"),
    ({"op_types": ["Conv2d"], "sparse_threshold": "low"}, "sparse_threshold"),
    ({"op_types": ["Conv2d"], "sparse_threshold": 0.1, "sparse_ratio": 0.1}, "sparse_threshold"),
    ({"op_names": ["mat"], "sparse_threshold": 0.1, "global_group_id": "x"}, "sparse_threshold"),
    ({"op_names": ["mat"], "sparse_threshold": 0.1, "internal_metric_block": 2}, "internal_metric_block"),
    ({"op_names": ["mat"], "sparse_ratio": 0.2, "internal_metric_block": 2, "global_group_id": 9}, "global_group_id"),
    ({"op_names": ["mat"], "internal_metric_block": 0}, "internal_metric_block"),
    ({"op_names": ["mat"], "internal_metric_block": 2.0}, "internal_metric_block"),
    ({"op_names": ["mat"], "internal_metric_block": 3, "dependency_group_id": None}, "internal_metric_block"),
    ({"op_names": ["mat"], "granularity": "per_channel"}, "granularity"),
    ({"op_names": ["mat"], "granularity": "row"}, "granularity"),
    ({"op_names": ["mat"], "granularity": 124}, "granularity"),
    ({"op_names": ["mat"], "granularity": "4:2"}, "granularity"),
    ({"op_names": ["mat"], "granularity": "0:4"}, "granularity"),
    ({"op_names": ["mat"], "granularity": []}, "granularity"),
    ({"op_names": ["mat"], "granularity": [0, 4]}, "granularity"),
    ({"op_names": ["mat"], "granularity": [3, 4]}, "granularity"),
    ({"op_names": ["mat"], "granularity": [1, 4, 4]}, "granularity"),
    ({"op_names": ["mat"], "granularity": [[4], "middle", 1]}, "granularity"),
    ({"op_names": ["mat"], "granularity": "2:5"}, "granularity"),
    ({"op_names": ["mat"], "granularity": "2:4", "sparse_ratio": 0.3}, "granularity"),
    ({"op_names": ["mat"], "granularity": "2:4", "global_group_id": 1}, "granularity"),
    ({"op_names": ["mat"], "granularity": "2:4", "max_sparse_ratio": 0.6}, "max_sparse_ratio"),
    ({"op_names": ["mat"], "target_names": ["bias"], "granularity": "2:4"}, "granularity"),
    ({"op_names": ["mat"], "target_names": ["bias"], "granularity": "in_channel"}, "granularity"),
    ({"op_names": ["mat"], "granularity": "element", "dependency_group_id": "d"}, "dependency_group_id"),
    ({"op_names": ["mat"], "granularity": [4, 4], "internal_metric_block": 2}, "internal_metric_block"),
    ({"op_names": ["mat", "emb"], "dependency_group_id": "d"}, "dependency_group_id"),
    ({"op_names": ["mat"], "dependency_group_id": True}, "dependency_group_id"),
    ({"op_names": ["mat"], "apply_method": "add"}, "apply_method"),
    ({"op_names": ["mat"], "apply_method": "bypass"}, "apply_method"),
    ({"op_names": ["mat"], "method": "l7_norm"}, "method"),
    ({"op_names": ["mat"], "method": "fpgm", "granularity": "element"}, "granularity"),
    ({"op_names": ["mat"], "options": {"q": 1}}, "options"),
    ({"op_names": ["mat"], "options": 3}, "options"),
    ({"op_names": ["mta"]}, "op_names"),
    ({"op_names": "mat"}, "op_names"),
    ({"op_names_re": ["["]}, "op_names_re"),
    ({"op_types": ["Conv9d"]}, "op_types"),
    ({"op_types": ["Linear"], "exclude_op_names": ["x"]}, "exclude_op_names"),
    ({"op_types": ["Linear"], "exclude_op_types": ["Linear"]}, ""),
    ({"exclude_op_names": ["a"]}, ""),
    ({"op_types": ["LayerNorm", "Linear"]}, "op_types"),
    ({"op_types": ["BatchNorm2d"]}, ""),
    ({"op_types": ["Linear"], "sparsity": 0.5}, "sparsity"),
    ({"op_types": ["Linear"], "target_names": []}, "target_names"),
    ({"op_types": ["Linear"], "target_names": "bias"}, "target_names"),
    ({"op_types": ["Linear"], "target_names": ["gamma"]}, "target_names"),
    ({"op_names": ["head"], "target_names": ["_input_1"]}, "target_names"),
    ({"op_names": ["head"], "target_settings": {"_output_y": {}}}, "target_settings"),
    ({"op_names": ["a"], "target_names": ["_output_logits"]}, "target_names"),
    ({"op_names": ["mat"], "target_names": ["_output_0"]}, "target_names"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "granularity": "out_channel"}, "granularity"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "granularity": "1:2"}, "granularity"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "granularity": [3, 2]}, "granularity"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "granularity": [1, 1, 1, 1]}, "granularity"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "apply_method": "times"}, "apply_method"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "apply_method": 3}, "apply_method"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "apply_options": {"constant": 1}}, "apply_options.constant"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "apply_options": 3}, "apply_options"),
    (
        {"op_names": ["bn"], "target_names": ["_output_0"], "apply_method": "add", "apply_options": {"constant": "x"}},
        "apply_options.constant",
    ),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "method": "fpgm"}, "method"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "internal_metric_block": 3}, "internal_metric_block"),
    ({"op_names": ["bn", "a"], "target_names": ["_output_0"], "dependency_group_id": "d"}, "dependency_group_id"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "sparse_threshold": 1, "global_group_id": 8}, "sparse_thr"),
    ({"op_names": ["bn"], "target_names": ["_output_0"], "target_settings": {"_input_": {}}}, "target_settings._input"),
    ({"op_names": ["bn"], "target_settings": {"_output_0": {"sparse_ratio": 7}}}, "target_settings._output_0.sparse_r"),
    ({"op_names": ["bn"], "target_names": ["_input_0"], "align": _BY_INPUT | {"dims": [0]}}, "align"),
    (
        {"op_names": ["bn"], "target_names": ["_input_0"], "align": _BY_INPUT | {"target_name": "_input_0"}},
        "align",
    ),
    ({"op_types": ["Linear"], "target_settings": {"bias": {"sparse_ratio": 2}}}, "target_settings.bias.sparse_ratio"),
    ({"op_types": ["Linear"], "target_settings": {"bias": {"op_types": []}}}, "target_settings.bias.op_types"),
    ({"op_types": ["Linear"], "target_settings": {"bias": 0.5}}, "target_settings.bias"),
    ({"op_types": ["Linear"], "target_settings": ["bias"]}, "target_settings"),
    ({"op_types": ["Linear"], "target_settings": {"scale": {}}}, "target_settings"),
    ({"op_names": ["mat"], "target_names": ["weight"], "target_settings": {"bias": {}}}, "target_settings.bias"),
    ({"op_names": ["bn"], "align": {"module_name": "mat", "target_name": "weight"}}, "align"),
    ({"op_names": ["bn"], "align": {"module_name": "mat", "target_name": "weight", "dims": []}}, "align.dims"),
    ({"op_names": ["bn"], "align": {"module_name": 3, "target_name": "weight", "dims": [0]}}, "align.module_name"),
    ({"op_names": ["bn"], "align": {"module_name": None, "target_name": "_input_7", "dims": [1]}}, "align.target_name"),
    ({"op_names": ["bn"], "align": {"module_name": None, "target_name": "_input_", "dims": [1]}}, "align"),
    ({"op_names": ["bn"], "align": {"module_name": "head", "target_name": "weight", "dims": [0]}}, "align"),
    ({"op_names": ["bn"], "align": {"module_name": "none", "target_name": "weight", "dims": [0]}}, "align"),
    ({"op_names": ["bn"], "align": {"module_name": "free", "target_name": "weight", "dims": [2]}}, "align"),
    ({"op_names": ["bn"], "align": {"module_name": "free", "target_name": "weight", "dims": [9]}}, "align"),
    ({"op_names": ["bn"], "align": {"module_name": "free", "target_name": "weight", "dims": [0, 1]}}, "align"),
    ({"op_names": ["bn"], "align": {"module_name": None, "target_name": "weight", "dims": [0]}}, "align"),
    (
        {"op_names": ["bn"], "sparse_ratio": 0.1, "align": _BY_INPUT},
        "sparse_ratio",
    ),
    (
        {"op_names": ["bn"], "global_group_id": 1, "align": _BY_INPUT},
        "global_group_id",
    ),
]  # fmt: skip


def spoil(rng: random.Random) -> tuple[list[Entry], Entry, str]:
    """A valid config list with one entry that is wrong, and what the message must say."""
    keys: Entry = {"sparse_ratio": rng.choice(RATIOS[:4])}
    entry, key = rng.choice(_BAD)
    good = [{"op_names": ["free"]}, {"op_names": ["a"], "sparse_ratio": 0.3}, {"op_names": ["stem", "b"]}]
    entries = rng.sample(good[1:], rng.randint(0, 2))
    place = rng.randint(0, len(entries))
    entries = [{"op_names": ["free"]}, *entries[:place], dict(entry), *entries[place:]]
    path = f"pruning.config_list[{place + 1}]"
    return entries, keys, f"{path}.{key}" if key else path


# ---- checks ----


def section(entries: list[Entry], **keys: Any) -> Config:
    """Without the detour over omegaconf, which takes half of the time."""
    return merge(Config, {"pruning": {"method": "l1_norm", "config_list": entries, **keys}}, "")


def check_valid(seed: int) -> None:
    rng = random.Random(seed)
    model = Wide()
    entries, keys, want = draw(rng, model)
    plain = not any("sparse_ratio" in key and key != "sparse_ratio" for e in entries for key in e if e[key] is not None)
    decisions = rng.randint(1, 3) if plain else 1
    schedule = {"name": "one_shot"} if decisions == 1 else {"name": "linear", "end": 1.0, "num_decisions": decisions}
    if any(is_activation(name) for name in want):
        schedule = {"name": "one_shot", "start": "1steps", "end": "1steps"}
    pruner, _, _ = attach(section(entries, schedule=schedule, **keys), model)
    if "activations" in pruner.unit_listeners:
        hear(pruner, model, comm.rank(), comm.world_size())
    for t in pruner.schedule:
        pruner.decide(t)
    got = pruner.masks()
    for name, parameter in model.named_parameters():
        mask = got[name].expand(parameter.shape).numpy() if name in got else np.ones(parameter.shape, bool)
        assert np.array_equal(mask, want[name]), f"seed {seed}: {name}: {entries} {keys}"
    acts = pruner.activations.on()
    assert set(acts) == {name for name in want if is_activation(name)}, f"seed {seed}: {entries}"
    for path, mask in acts.items():
        assert np.array_equal(mask.expand(want[path].shape).numpy(), want[path]), (
            f"seed {seed}: {path}: {entries} {keys}"
        )


def check_invalid(seed: int) -> None:
    entries, keys, path = spoil(random.Random(seed))
    try:
        attach(section(entries, **keys), Wide())
    except UserError as error:
        assert path in str(error), f"seed {seed}: {path} is not in: {error}"
    else:
        raise AssertionError(f"seed {seed}: accepted {entries}")


def check(what: Callable[[int], None], seeds: range) -> None:
    for seed in seeds:
        what(seed)


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    check(check_valid, range(number))
    check(check_invalid, range(number))
    print(f"{number} valid and {number} invalid config lists: as they should be")
