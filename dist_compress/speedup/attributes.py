"""The integers of modules that follow the shapes of their parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dist_compress.speedup import sets
from dist_compress.speedup.keep import Keep
from dist_compress.speedup.movement import View
from dist_compress.speedup.origin import behind, layer_of, makers
from dist_compress.speedup.recurrent import recurrent_sizes
from dist_compress.speedup.rules import rule_of
from dist_compress.speedup.structure import Structure
from dist_compress.tracing import Ref
from dist_compress.tracing.attribute_uses import Use
from dist_compress.tracing.walk import modules_of

# Per module type: which integer is the size of which dim of the weight.
_SIZES: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (nn.modules.batchnorm._NormBase, {"num_features": 0}),
    (nn.GroupNorm, {"num_channels": 0}),
    (nn.Embedding, {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.EmbeddingBag, {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.Bilinear, {"out_features": 0, "in1_features": 1, "in2_features": 2}),
    (nn.PReLU, {"num_parameters": 0}),
)

_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
_TOTALS = ("inner_dim", "all_head_size")


def attributes(s: Structure, keep: Keep, model: nn.Module, uses: Callable[[], list[Use] | None]) -> dict[str, int]:
    """{"module fqn.attribute": new value} for every integer that changes.

    uses(): what the integers of users' modules were used for in the run behind `s`, None where that is not known.
    """
    modules = modules_of(model)
    found: dict[str, int] = {}
    counts = keep.counts()
    made_by = makers(s.trace)
    weights = {c.b: behind(s.trace, made_by, c.b)[0] or c.b for c in s.contractions if c.groups is not None}
    groups = {weights[c.b].id: c.groups for c in s.contractions if c.groups is not None}
    by_module = {c.op.module: c.groups for c in s.contractions if c.groups is not None}  # of computed weights
    for key in s.known():
        info = s.trace.info(Ref(key))
        for fqn in info.all_fqns:
            owner, name = layer_of(fqn)
            if (name, info.kind) not in (("weight", "param"), ("running_mean", "buffer")):
                continue
            module = modules[owner]
            sizes = [counts[var] for var in s.dims(Ref(key))]
            new = {}
            if isinstance(module, nn.modules.conv._ConvNd):
                group = groups.get(key, by_module.get(owner))
                num_groups = module.groups if group is None else counts[group]
                new = _convolution(module, sizes, num_groups)
            for kind, names in _SIZES:
                if isinstance(module, kind):
                    new = {attr: sizes[dim] for attr, dim in names.items()}
            if isinstance(module, nn.GroupNorm):
                new["num_groups"] = counts[s.whole_groups[key]]
            found.update((f"{owner}.{attr}".lstrip("."), n) for attr, n in new.items() if getattr(module, attr) != n)
    return found | recurrent_sizes(s, keep, modules) | _bare_norms(s, keep, modules) | _of_users(s, keep, modules, uses)


def _bare_norms(s: Structure, keep: Keep, modules: dict[str, nn.Module]) -> dict[str, int]:
    """The channels and groups of norms that have neither weights nor statistics."""
    found: dict[str, int] = {}
    known = set(s.known())
    for fqn, refs in s.trace.calls:
        module = modules[fqn]
        channels = getattr(module, "num_channels", getattr(module, "num_features", None))
        bare = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and not module.state_dict()
        if not bare or len(refs) != 1 or refs[0].id not in known or s.trace.info(refs[0]).shape[1] != channels:
            continue
        kept = keep.counts()[s.dims(refs[0])[1]]
        if isinstance(module, nn.GroupNorm) and refs[0].id in s.whole_groups:
            groups = keep.counts()[s.whole_groups[refs[0].id]]
            new = {"num_channels": kept, "num_groups": groups}
        else:
            new = {"num_features": kept}
        found |= {f"{fqn}.{attr}".lstrip("."): n for attr, n in new.items() if getattr(module, attr) != n}
    return found


def _convolution(module: nn.modules.conv._ConvNd, sizes: list[int], groups: int) -> dict[str, int]:
    out, into = (sizes[1], sizes[0]) if module.transposed else (sizes[0], sizes[1])
    if module.transposed:
        return {"in_channels": into, "out_channels": out * groups, "groups": groups}
    return {"in_channels": into * groups, "out_channels": out, "groups": groups}


def _of_users(
    s: Structure, keep: Keep, modules: dict[str, nn.Module], uses: Callable[[], list[Use] | None]
) -> dict[str, int]:
    """What a size was used for says what it becomes; numbers of heads that nothing uses go by their values."""
    shrunk, known = keep.shrunk(), set(s.known())
    touched = {
        op.module
        for op in s.trace.tape
        for ref in op.inputs
        if ref.id in known and not shrunk.isdisjoint(s.dims(ref)) and _is_users(modules[op.module])
    }
    if not any(type(value) is int and value > 1 for name in touched for value in vars(modules[name]).values()):
        return {}
    used, guessed = uses(), _head_counts(s, keep, modules)
    if used is None:
        return guessed
    after: dict[str, set[int]] = {}
    old = {use.attribute: use.value for use in used}
    for use in used:
        if use.ref.id in known:
            kept = keep.kept[s.dims(use.ref)[use.dim]]
            after.setdefault(use.attribute, set()).add(int(kept[: use.value].sum() if use.prefix else kept.sum()))
    found = {fqn: next(iter(new)) for fqn, new in after.items() if len(new) == 1 and new != {old[fqn]}}
    names = {fqn: fqn.rpartition(".")[2] for fqn in guessed if fqn not in old}
    found |= {fqn: guessed[fqn] for fqn, name in names.items() if "head" in name}
    return found | _totals(found, set(old), modules)


def _totals(found: dict[str, int], used: set[str], modules: dict[str, nn.Module]) -> dict[str, int]:
    """Products with a number of heads that changed, which nothing uses."""
    totals: dict[str, int] = {}
    for fqn, new in found.items():
        owner, _, name = fqn.rpartition(".")
        module = modules[owner]
        for total in _TOTALS if name in _HEADS else ():
            size = getattr(module, total, None)
            if type(size) is int and f"{owner}.{total}" not in used:
                totals[f"{owner}.{total}"] = size * new // getattr(module, name)
    return totals


def _is_users(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn.")


def _head_counts(s: Structure, keep: Keep, modules: dict[str, nn.Module]) -> dict[str, int]:
    """Integers of users' modules that their views split by: `num_heads` in reshape(B, N, 3, self.num_heads, -1).

    An integer is set when it equals the old size of a dim that a view of this very module made or read, and all such
    dims of this size shrank alike. Where 4 heads are of size 4, a number of heads follows the outer dims of what the
    views split and merge, a size the innermost. Whether that was right is decided by the rehearsal of the plan.
    """
    changes: dict[tuple[str, int, str], set[int]] = {}
    known = set(s.known())
    for op in s.trace.tape:
        if isinstance(rule_of(op), View) and {op.inputs[0].id, op.out.id} <= known:
            shapes = [s.trace.info(ref).shape for ref in (op.inputs[0], op.out)]
            for group in sets.view_groups(*shapes):
                for ref, dims in zip((op.inputs[0], op.out), group, strict=True):
                    for d in dims:
                        var = s.dims(ref)[d]
                        place = "alone" if len(dims) == 1 else "inner" if d == dims[-1] else "outer"
                        changes.setdefault((op.module, s.sizes[var], place), set()).add(keep.counts()[var])
    found = {}
    for (owner, size, _), new in changes.items():
        if new == {size} or not _is_users(modules[owner]):
            continue
        for name, value in vars(modules[owner]).items():
            if type(value) is not int or value != size or name.startswith("_"):
                continue
            count = "heads" in name and "dim" not in name
            places = ("outer",) if count else ("inner",) if "dim" in name else ("outer", "inner", "alone")
            after = set().union(*(changes.get((owner, size, place), set()) for place in places))
            changed = after - {size}
            if len(changed) == 1 and (count or len(after) == 1):
                found[f"{owner}.{name}".lstrip(".")] = next(iter(changed))
    return found
