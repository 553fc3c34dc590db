"""What of a setting excludes what else: each refusal names both keys and where they come from."""

from __future__ import annotations

from dist_compress.config import PruningConfig
from dist_compress.errors import UserError
from dist_compress.pruning.activation_mask import options_of
from dist_compress.pruning.metric import Metric
from dist_compress.pruning.setting import AT_MOST, Setting, check_agree

_BOUNDS = ("min_sparse_ratio", "max_sparse_ratio")
_GROUPED = ("global_group_id", "dependency_group_id", "internal_metric_block")


def check_whole(setting: Setting) -> None:
    """Raise UserError unless the keys of a target, merged and completed, go together."""
    if setting.align:
        own = ("sparse_ratio", "sparse_threshold", *_BOUNDS, *_GROUPED, *["granularity"] * bool(setting.pattern))
        _refuse(setting, "align", own, "it follows another mask")
        return
    if setting.pattern:
        _refuse(setting, "granularity", ("sparse_threshold", *_BOUNDS, *_GROUPED), "N of each M weights are kept")
    elif not setting.by_units:
        why = "only channels depend on each other"
        _refuse(setting, "granularity", ("dependency_group_id", "internal_metric_block"), why)
    if setting.sparse_threshold is not None:
        why = "a threshold decides each unit by its own score, and a group spends a ratio"
        _refuse(setting, "sparse_threshold", ("global_group_id", "internal_metric_block"), why)
    if setting.global_group_id is not None:
        _refuse(setting, "global_group_id", ("internal_metric_block",), "the group ranks all units together")
    _check_bounds(setting)


def check_kind(setting: Setting) -> None:
    """Raise UserError for what only parameters, or only activations, can be asked."""
    if not setting.activation:
        if setting.granularity == "per_channel":
            said = setting.said_by("granularity")
            raise UserError(f"{said} is for activations, but {setting.name} has out_channel and in_channel.")
        if setting.apply_method != "mul" or setting.apply_options:
            said = setting.said_by("apply_method" if setting.apply_method != "mul" else "apply_options")
            raise UserError(
                f"{said} is for activations: the masked weights of {setting.name} are zero, there is no other way."
            )
        return
    if setting.granularity in ("out_channel", "in_channel") or setting.pattern:
        raise UserError(
            f"{setting.name}: {setting.said_by('granularity')} is for parameters. An activation has per_channel, "
            "element and block sizes."
        )
    key = setting.sources.get("apply_method", setting.sources[""])
    options_of(setting.apply_method, setting.apply_options, key)


def _refuse(setting: Setting, key: str, others: tuple[str, ...], why: str) -> None:
    asked = [
        other
        for other in others
        if other in setting.sources
        and (getattr(setting, other) not in (None, Setting.default(other)) or other == "sparse_ratio")
    ]
    if asked:
        said = " and ".join(setting.said_by(other) for other in asked)
        raise UserError(f"{setting.name}: {setting.said_by(key)} and {said} exclude each other: {why}. Keep one.")


def _check_bounds(setting: Setting) -> None:
    low, high = setting.min_sparse_ratio, setting.max_sparse_ratio
    if low > high:
        raise UserError(
            f"{setting.name}: {setting.said_by('min_sparse_ratio')} is above {setting.said_by('max_sparse_ratio')}."
        )
    alone = setting.global_group_id is None and setting.sparse_threshold is None and not setting.limited
    if alone and not setting.pattern and not low <= setting.sparse_ratio <= high:
        raise UserError(
            f"{setting.name}: {setting.said_by('sparse_ratio')} lies outside of {setting.said_by('min_sparse_ratio')} "
            f"and {setting.said_by('max_sparse_ratio')}. Without a global_group_id the ratio is spent in the target "
            "itself."
        )


def has_limit(config: PruningConfig) -> bool:
    return any(value is not None for value in vars(config.at_most).values())


def check_limited(settings: list[Setting], config: PruningConfig) -> None:
    """Targets that share `pruning.at_most` become one group. Raises UserError for what has no part in it."""
    if not has_limit(config):
        return
    limits = ", ".join(f"{AT_MOST}.{key}={value:.10g}" for key, value in vars(config.at_most).items() if value)
    if config.sparse_ratio is not None:
        raise UserError(
            f"{limits} and pruning.sparse_ratio={config.sparse_ratio} both say how much goes. Set "
            "pruning.sparse_ratio=null, or leave out pruning.at_most; entries may have ratios of their own."
        )
    mine = [s for s in settings if s.limited]
    if not mine:
        raise UserError(f"{limits}: every target has a ratio or threshold of its own. Take it from one of them.")
    for s in mine:
        if s.internal_metric_block > 1:
            raise UserError(
                f"{s.name}: {s.said_by('internal_metric_block')} and {limits} exclude each other: all units are ranked "
                "together. Give it a sparse_ratio of its own."
            )
        if s.activation:
            raise UserError(
                f"{s.name}: masks of activations make no model smaller, so {limits} says nothing about it. Give it a "
                "sparse_ratio of its own."
            )
        if not s.by_units or s.dependency_group_id != "auto":
            key = "dependency_group_id" if s.by_units else "granularity"
            why = "such channels may stay in the model" if s.by_units else "the zeros stay in the model"
            raise UserError(
                f"{s.name}: {s.said_by(key)} has no part in {limits}: {why}. Give it a sparse_ratio of its own."
            )
    ids = {s.global_group_id: s for s in mine if s.global_group_id is not None}
    others = {s.global_group_id: s for s in settings if not s.limited and s.global_group_id in ids}
    if others or len(ids) > 1:
        a, b = list(ids.values())[0], [*others.values(), *ids.values()][0 if others else 1]
        raise UserError(
            f"{a.name} ({a.said_by('global_group_id')}) and {b.name} ({b.said_by('global_group_id')}): with {limits} "
            "all targets without a ratio of their own are one group. Give them no global_group_id, or one for all."
        )
    for s in mine:
        s.global_group_id = AT_MOST


def check_global_groups(settings: list[Setting]) -> None:
    """Members of a global group agree on everything but their bounds."""
    first: dict[str, Setting] = {}
    for setting in settings:
        if setting.align or setting.global_group_id is None:
            continue
        head = first.setdefault(setting.global_group_id, setting)
        check_agree(head, setting, ("sparse_ratio", "granularity", "method", "options"), "global_group_id")


def check_method(setting: Setting, metric: Metric) -> None:
    """Raise UserError unless the method can decide what the target asks for."""
    if setting.activation and not metric.hears_activations():
        raise UserError(
            f"{setting.name}: {setting.said_by('method')} does not score activations: it defines neither "
            "`activation_statistic` nor `output_statistic`. Choose another method, such as l1_norm, taylor or apoz."
        )
    if setting.activation:
        return
    if missing := metric.missing(not setting.by_units):
        raise UserError(
            f"{setting.name}: {setting.said_by('granularity')} needs `{missing[0]}` of method "
            f"{setting.method!r}, which does not define it. Define it, or choose another granularity or method."
        )
    if metric.solves and not setting.pattern:
        why = f"{setting.method} solves each layer by itself"
        _refuse(setting, "method", ("global_group_id", "sparse_threshold"), why)
        if setting.granularity != "element":
            raise UserError(
                f"{setting.name}: {setting.said_by('granularity')}: {setting.method} decides single weights. Use "
                "granularity: element, or N:M such as '2:4'."
            )
    if metric.regrows and setting.pattern:
        raise UserError(
            f"{setting.name}: {setting.said_by('granularity')}: {setting.method} exchanges weights anywhere in a "
            "target. Use granularity: element, or method: sr_ste for N:M."
        )
    if metric.regrows:
        why = f"{setting.method} exchanges weights inside of a target, whose sparse_ratio holds"
        _refuse(setting, "method", ("global_group_id", "sparse_threshold"), why)
