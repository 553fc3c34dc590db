"""What a valid config list must remove, said a second time: plain loops over numpy arrays.

It shares no code with the product and writes the rules down again: how values merge, which channels are one unit, what
goes with them, how a ratio, a threshold, a pattern or a global group is spent.
"""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
from activation_reference import activation_sets, asked_of, held, is_activation, regions, sides, spread
from pruning_nets import COUPLING
from torch import nn

Entry = dict[str, Any]
Masks = dict[str, np.ndarray]
HOW_MUCH = ("sparse_ratio", "sparse_threshold", "align")
NULLABLE = (*HOW_MUCH, "min_sparse_ratio", "max_sparse_ratio", "granularity", "internal_metric_block")
NORMS = {"stem": "bn", "a": "bn_a", "b": "bn_b"}
OUT = ("Embedding", "ConvTranspose2d")  # output channels lie in dim 1


def exact(value: float) -> Fraction:
    return Fraction(str(value))


def merged(entries: list[Entry], model: nn.Module) -> dict[str, Entry]:
    """{parameter: what it is asked}, in model order, then {activation: what it is asked}."""
    modules = dict(model.named_modules())
    asked: dict[str, Entry] = {}
    for entry in entries:
        names = {n for n in modules if n in entry.get("op_names", [])}
        names |= {n for n in modules if n and any(re.match(p, n) for p in entry.get("op_names_re", []))}
        typed = {n for n, m in modules.items() if type(m).__name__ in entry.get("op_types", [])}
        if entry.get("op_types"):
            names = typed & names if entry.get("op_names") or entry.get("op_names_re") else typed
        names -= set(entry.get("exclude_op_names", []))
        for name in names:
            own = {n: p for n, p in modules[name].named_parameters(recurse=False)}
            default = [n for n, p in own.items() if n == "weight" and (p.dim() > 1 or "align" in entry)]
            settings = entry.get("target_settings", {})
            values = {k: v for k, v in entry.items() if not re.match("op_|exclude_|target_", k)}
            for target in entry.get("target_names", [*default, *settings]):
                if target in own:
                    override(asked.setdefault(f"{name}.{target}", {}), values)
                    override(asked[f"{name}.{target}"], settings.get(target, {}))
            for path, more in asked_of(entry, name).items():
                for new in (values, *more):
                    override(asked.setdefault(path, {}), new)
    order = [n for n, _ in model.named_parameters()] + [p for p in asked if is_activation(p)]
    return {n: asked[n] for n in order if n in asked}


def override(values: Entry, new: Entry) -> None:
    for key in HOW_MUCH:
        if new.get(key) is not None:
            for other in HOW_MUCH:
                if new.get(other) is None:
                    values.pop(other, None)
    for key, value in new.items():
        if value is None and key in NULLABLE:
            values.pop(key, None)
        else:
            values[key] = value


def expected(entries: list[Entry], ratio: float, model: nn.Module) -> tuple[Masks, int]:
    """(the masks that a valid list demands, how many things are decided)."""
    weights = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    masks = {n: np.ones(w.shape, bool) for n, w in weights.items()}
    asked = merged(entries, model)
    own = {n for n, s in asked.items() if not s.get("align") and not is_activation(n)}
    heard = {n: s for n, s in asked.items() if not s.get("align") and is_activation(n)}
    rows = [
        n for n in own if covers_rows(asked[n], weights[n]) and n.endswith("weight") and type_of(model, n) not in OUT
    ]
    for name in [n for n, s in asked.items() if s.get("align") and n.endswith("weight")] + rows:
        bias = name.replace("weight", "bias")
        if bias in weights and bias not in asked and asked[name].get("granularity") != "in_channel":
            align = asked[name].get("align") or {"module_name": name[:-7], "target_name": "weight", "dims": [0]}
            source = align["module_name"] or name[:-7]
            asked[bias] = {"align": {**align, "module_name": source, "dims": align["dims"][:1]}}
    sets = unit_sets({n: asked[n] for n in own if by_units(asked[n])}, own, weights, model)
    tensors = {n: tiles(asked[n], weights[n], type_of(model, n)) for n in own if not by_units(asked[n])}
    decide_units(sets, ratio, masks)
    decide_blocks(tensors, asked, weights, ratio, masks)
    by_unit = {n: np.ones(len(regions(s, held()[n]["l1_norm"].shape)), bool) for n, s in heard.items()}
    decide_units(activation_sets(heard), ratio, by_unit)
    masks |= {n: spread(s, by_unit[n], n) for n, s in heard.items()}
    masks |= {n: np.ones((1, *held()[n]["l1_norm"].shape), bool) for n in asked if is_activation(n) and n not in heard}
    follow({n: s for n, s in asked.items() if s.get("align")}, model, masks)
    return masks, len(sets) + len(tensors) + len(heard)


def type_of(model: nn.Module, parameter: str) -> str:
    return type(model.get_submodule(parameter.rpartition(".")[0])).__name__


def by_units(s: Entry) -> bool:
    return s.get("granularity", "default") in ("default", "out_channel", "in_channel")


def covers_rows(s: Entry, weight: np.ndarray) -> bool:
    g = s.get("granularity")
    return (
        isinstance(g, list)
        and weight.ndim > 1
        and all(k in (-1, n) for k, n in zip(sizes(g, weight)[1:], weight.shape[1:], strict=True))
    )


def sizes(g: Any, weight: np.ndarray) -> list[int]:
    if g == "element" or ":" in g:
        return [1] * weight.ndim
    kernel, mode, pad = g if isinstance(g[0], list) else (g, "front", 1)
    fill = [pad] * (weight.ndim - len(kernel))
    full = fill + kernel if mode == "front" else kernel + fill
    return [n if k == -1 else k for k, n in zip(full, weight.shape, strict=True)]


def norm(values: np.ndarray, method: str) -> float:
    return float(np.abs(values).sum() if method == "l1_norm" else np.sqrt((values**2).sum()))


def unit_sets(targets: dict[str, Entry], own: set[str], weights: Masks, model: nn.Module) -> list[Entry]:
    """[{asked, n, scored [(parameter, dim, index)], masked}]."""
    sets = []
    for role, granularity in (("producer", "out_channel"), ("consumer", "in_channel")):
        auto = {
            n: s
            for n, s in targets.items()
            if s.get("dependency_group_id", "auto") == "auto" and weights[n].ndim > 1
            and (s.get("granularity", "default") == granularity or (role == "producer" and "granularity" not in s))
        }  # fmt: skip
        for group in COUPLING.groups:
            makers = [m for m in group.members if m.role == role and weights[m.fqn].ndim > 1]
            chosen = [m for m in makers if m.fqn in auto]
            covered = all(m.fqn in auto or m.fqn == "depthwise.weight" for m in makers)
            if chosen and covered and not group.blocked:
                masked = [
                    (m.fqn, m.dim, m.index.numpy()) for m in group.members if m.role in ("producer", "affine", role)
                ]
                scored = [(m.fqn, m.dim, m.index.numpy()) for m in chosen]
                sets.append(
                    {"asked": [auto[m.fqn] for m in chosen], "n": group.num_units, "scored": scored, "masked": masked}
                )
    alone: dict[str, list[str]] = {}
    for name, s in targets.items():
        group_id = s.get("dependency_group_id", "auto")
        if group_id != "auto" or weights[name].ndim == 1:
            alone.setdefault(name if group_id in (None, "none", "auto") else str(group_id), []).append(name)
    for names in alone.values():
        scored, masked = [], []
        for name in names:
            inward, swapped = targets[name].get("granularity") == "in_channel", type_of(model, name) in OUT
            dim = int(inward != swapped) if weights[name].ndim > 1 else 0
            index = np.arange(weights[name].shape[dim])[:, None]
            scored.append((name, dim, index))
            masked.append((name, dim, index))
            module, _, target = name.rpartition(".")
            if target == "weight" and not inward:
                after = [f"{module}.bias", *(f"{NORMS[module]}.{p}" for p in ("weight", "bias") if module in NORMS)]
                masked += [(n, 0, index) for n in after if n in weights and n not in own]
        sets.append({"asked": [targets[n] for n in names], "n": len(scored[0][2]), "scored": scored, "masked": masked})
    for s in sets:
        method = s["asked"][0].get("method", "l1_norm")
        parts = [[norm(weights[f].take(i, d), method) for i in index] for f, d, index in s["scored"]]
        s["score"] = np.mean(parts, 0, dtype=np.float64).astype(np.float32)
    return sets


def decide_units(sets: list[Entry], ratio: float, masks: Masks) -> None:
    for s in sets:
        asked, n, order = s["asked"][0], s["n"], np.argsort(s["score"])
        s["gone"] = []
        if asked.get("global_group_id") is not None:
            continue
        parts = math.lcm(*(a.get("internal_metric_block", 1) for a in s["asked"]))
        if "sparse_threshold" in asked:
            s["gone"] = order[: min(below(asked, s["score"]), n - 1)].tolist()
        else:
            count = math.floor(exact(asked.get("sparse_ratio", ratio)) * (n // parts))
            for part in range(parts):
                s["gone"] += [u for u in order.tolist() if u // (n // parts) == part][:count]
    ids = dict.fromkeys(s["asked"][0].get("global_group_id") for s in sets)
    for gid in [i for i in ids if i is not None]:
        spend([s for s in sets if s["asked"][0].get("global_group_id") == gid], ratio)
    for s in sets:
        for fqn, dim, index in s["masked"]:
            moved = np.moveaxis(masks[fqn], dim, 0)
            moved[index[s["gone"]].flatten()] = False


def spend(members: list[Entry], ratio: float) -> None:
    """A global group of channels, in channels: one after the other, cheapest score first."""
    rest = []
    for s in members:
        asked, order = s["asked"][0], np.argsort(s["score"]).tolist()
        low = math.ceil(exact(asked.get("min_sparse_ratio", 0.0)) * s["n"])
        high = min(math.floor(exact(asked.get("max_sparse_ratio", 1.0)) * s["n"]), s["n"] - 1)
        s["gone"] = order[:low]
        rest += [(s["score"][u], u, s) for u in order[low:high]]
    total = sum(s["n"] for s in members)
    wanted = exact(members[0]["asked"][0].get("sparse_ratio", ratio)) * total
    for _, u, s in sorted(rest, key=lambda item: item[0]):
        if sum(len(s["gone"]) for s in members) < wanted:
            s["gone"].append(u)


def below(asked: Entry, scores: np.ndarray) -> int:
    n = len(scores)
    low = math.ceil(exact(asked.get("min_sparse_ratio", 0.0)) * n)
    high = math.floor(exact(asked.get("max_sparse_ratio", 1.0)) * n)
    return min(max(int((scores < np.float32(asked["sparse_threshold"])).sum()), low), high)


def tiles(s: Entry, weight: np.ndarray, kind: str) -> list[tuple[slice, ...]]:
    """The blocks of a parameter; of an N:M pattern its weights, those of a group one after the other."""
    cut = sizes(s["granularity"], weight)
    starts = [range(0, n, k) for n, k in zip(weight.shape, cut, strict=True)]
    corners = list(itertools.product(*starts))
    if ":" in s["granularity"]:
        dim = 0 if kind in OUT else 1
        corners.sort(key=lambda c: (*c[:dim], *c[dim + 1 :], c[dim]))
    return [tuple(slice(c, c + k) for c, k in zip(corner, cut, strict=True)) for corner in corners]


def decide_blocks(tensors: dict[str, Any], asked: dict[str, Entry], weights: Masks, ratio: float, masks: Masks) -> None:
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(str(asked[name].get("global_group_id") or name), []).append(name)
    for names in groups.values():
        rest, gone, total, bounds = [], {n: [] for n in names}, 0, [0, 0]
        for name in names:
            s, cut = asked[name], tensors[name]
            score = np.array([norm(weights[name][place], s.get("method", "l1_norm")) for place in cut], np.float32)
            order, cost = np.argsort(score).tolist(), weights[name][cut[0]].size
            if ":" in s["granularity"]:
                keep, of = map(int, s["granularity"].split(":"))
                for group in range(0, len(cut), of):
                    gone[name] += [group + u for u in np.argsort(score[group : group + of])[: of - keep].tolist()]
            elif "sparse_threshold" in s:
                gone[name] = order[: below(s, score)]
            elif s.get("global_group_id") is None:
                gone[name] = order[: math.floor(exact(s.get("sparse_ratio", ratio)) * len(cut))]
            else:
                low = math.ceil(exact(s.get("min_sparse_ratio", 0.0)) * len(cut))
                high = math.floor(exact(s.get("max_sparse_ratio", 1.0)) * len(cut))
                gone[name], total = order[:low], total + len(cut) * cost
                bounds = [bounds[0] + low * cost, bounds[1] + high * cost]
                rest += [(score[u], u, name, cost) for u in order[low:high]]
        spent = bounds[0]
        wanted = min(max(math.ceil(exact(asked[names[0]].get("sparse_ratio", ratio)) * total), bounds[0]), bounds[1])
        for _, u, name, cost in sorted(rest, key=lambda item: item[0]):
            if spent < wanted:
                gone[name].append(u)
                spent += cost
        for name in names:
            for u in gone[name]:
                masks[name][tensors[name][u]] = False


def follow(aligned: dict[str, Entry], model: nn.Module, masks: Masks) -> None:
    waiting = dict(aligned)
    while waiting:
        for name, s in list(waiting.items()):
            align = s["align"]
            target = sides(align["target_name"]) if is_activation(align["target_name"]) else align["target_name"]
            source = f"{align['module_name'] or name.rpartition('.')[0]}.{target}"
            if source in waiting:
                continue
            del waiting[name]
            dims = [d % masks[source].ndim for d in align["dims"]]
            alive = np.zeros([masks[source].shape[d] for d in dims], bool)
            for place in np.argwhere(masks[source]):
                alive[tuple(place[d] for d in dims)] = True
            places = list(range(is_activation(name), len(dims) + is_activation(name)))
            if len(dims) == 1 and masks[name].ndim > 1 and not is_activation(name):
                places = [int((s.get("granularity") == "in_channel") != (type_of(model, name) in OUT))]
            mask = np.ones_like(masks[name])
            for place in np.ndindex(*mask.shape):
                mask[place] = alive[tuple(place[p] for p in places)]
            if is_activation(name):
                for place in regions(s, mask.shape[1:]):
                    mask[0][place] = mask[0][place].any()
            elif isinstance(s.get("granularity"), list):
                for tile in tiles(s, mask, ""):
                    mask[tile] = mask[tile].any()
            masks[name] &= mask
