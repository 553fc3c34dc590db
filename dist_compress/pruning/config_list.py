"""`pruning.config_list`: which parameters are targets, and what each of them is asked for.

Keys and their meaning follow the NNI 3.0 config list. What is asked of a target is merged key by key: the defaults of
the module's type, then the entries in order, each with its `target_settings` last. A later value wins. `sparse_ratio`,
`sparse_threshold` and `align` answer one question, so a later one also takes the place of an earlier other one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_compress.blocks import OUT_DIM_1, Blocks, channel_dim
from dist_compress.config import PruningConfig
from dist_compress.errors import UserError
from dist_compress.pruning import entry as entries
from dist_compress.pruning.checks import check_global_groups, check_whole
from dist_compress.pruning.defaults import Defaults
from dist_compress.pruning.entry import Entry
from dist_compress.pruning.metric import metric_class
from dist_compress.pruning.setting import DEFAULTS, ROOT, Align, Setting, shown
from dist_compress.selection import Modules

HOW_MUCH = ("sparse_ratio", "sparse_threshold", "align")  # a later one takes the place of an earlier one
Merged = dict[tuple[str, str], Setting]


def resolve(config: PruningConfig, model: nn.Module) -> list[Setting]:
    """The targets and aligned parameters in model order. Local, the same on every rank. Raises UserError."""
    if not config.config_list:
        raise UserError(f"{ROOT} is empty: add an entry such as {{op_types: [Conv2d]}}, or set pruning.method=null.")
    modules = Modules(model)
    defaults = Defaults(config, modules)
    merged: Merged = {}
    for number, given in enumerate(config.config_list):
        entry = entries.check(given, f"{ROOT}[{number}]")
        for name, targets in _targets(given, entry, modules, defaults).items():
            for target in targets:
                if (name, target) not in merged:
                    merged[name, target] = Setting(name, target)
                    for values, where in defaults.of(modules.modules[name], 1).get(target, []):
                        _override(merged[name, target], values, where)
                for values, where in entry.asked_of(target):
                    _override(merged[name, target], values, where)
                merged[name, target].sources[""] = entry.where
    for setting in merged.values():
        _inherit(setting, config)
        check_whole(setting)
    for setting in list(merged.values()):
        _fit(setting, model)
        _add_bias(setting, model, merged)
    settings = [merged[key] for key in _model_order(modules) if key in merged]
    check_global_groups(settings)
    return settings


def overrides(settings: list[Setting]) -> list[str]:
    """What was overridden by what, one line for each pair of values with the targets it is about."""
    found: dict[tuple[str, str], list[str]] = {}
    for setting in settings:
        for pair in setting.overridden:
            found.setdefault(pair, []).append(setting.name)
    return [f"{new} overrides {old} for {_names(names)}" for (new, old), names in found.items()]


def _names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _targets(given: dict[str, Any], entry: Entry, modules: Modules, defaults: Defaults) -> dict[str, list[str]]:
    """{module: names of parameters} that an entry is about. Modules that a pattern finds besides are left out."""
    where, wanted = entry.where, entry.target_names
    least = 1 if entry.values.get("align") or wanted or entry.target_settings else 2
    chosen = modules.chosen(given, where)
    found: dict[str, list[str]] = {}
    for name in chosen:
        module = modules.modules[name]
        names = wanted or [*defaults.of(module, 1 if entry.values.get("align") else 2), *entry.target_settings]
        present = [n for n in dict.fromkeys(names) if module._parameters.get(n) is not None]
        if present:
            found[name] = present
    _check_parameters_exist(entry, chosen, modules)
    unfit = [name for name in chosen if name not in found]
    if unfit and (given.get("op_types") or not given.get("op_names_re") or not found):
        kind = type(modules.modules[unfit[0]]).__name__
        lacks = f"no parameter {' or '.join(wanted)}" if wanted else f"no weight of {least} or more dimensions"
        raise UserError(
            f"{where} selects {unfit[0]} ({kind}), which has {lacks} to prune. "
            f"Prunable types in this model: {modules.prunable_types(least)}."
        )
    return found


def _check_parameters_exist(entry: Entry, chosen: list[str], modules: Modules) -> None:
    """Every named target is a parameter of a selected module."""
    key = "target_names" if entry.target_names else "target_settings"
    for target in entry.target_names or entry.target_settings:
        if not any(modules.modules[name]._parameters.get(target) is not None for name in chosen):
            have = sorted({p for name in chosen for p, _ in modules.modules[name].named_parameters(recurse=False)})
            raise UserError(
                f"{entry.where}.{key}: no selected module has a parameter {target!r}; "
                f"they have {', '.join(have) or 'none'}."
            )


def _override(setting: Setting, values: dict[str, Any], where: str) -> None:
    """Let `values`, written at `where`, win over what was said before."""
    own = where.partition(".target_settings.")[0]
    for key in ("global_group_id", "dependency_group_id"):
        old = getattr(setting, key)
        if {old, values.get(key)} & {None, "auto"} or old == values[key]:
            continue
        if setting.sources.get(key, own).startswith(ROOT) and setting.sources.get(key) != own:
            raise UserError(
                f"{setting.name} is put in two groups: {setting.said_by(key)} and "
                f"{where}.{key}={values[key]!r}. Exclude it from one entry, or set {key}: null there."
            )
    if "method" in values and "options" not in values:
        values = {**values, "options": {}}
    for key in HOW_MUCH:
        if values.get(key) is not None:
            for other in HOW_MUCH:
                if other != key and values.get(other) is None and other in setting.sources:
                    _note(setting, key, values[key], where, other)
                    _take_back(setting, other)
    for key, value in values.items():
        if key in setting.sources and getattr(setting, key) != value:
            _note(setting, key, value, where, key)
        if key in entries.TAKES_BACK and value is None:
            _take_back(setting, key)
            continue
        setattr(setting, key, value)
        setting.sources[key] = where


def _note(setting: Setting, key: str, value: Any, where: str, old: str) -> None:
    """Remember that a value of the config list lost."""
    if setting.sources[old].startswith(ROOT) and not where.startswith(f"{setting.sources[old]}.target_settings."):
        setting.overridden.append((f"{where}.{key}={shown(value)}", setting.said_by(old)))


def _take_back(setting: Setting, key: str) -> None:
    setattr(setting, key, DEFAULTS[key])
    setting.sources.pop(key, None)


def _inherit(setting: Setting, config: PruningConfig) -> None:
    """What no entry set."""
    where = setting.sources[""]
    if setting.align:
        return
    if setting.pattern:
        keep, of = setting.pattern
        if "sparse_ratio" in setting.sources and setting.sparse_ratio != (of - keep) / of:
            raise UserError(
                f"{setting.name}: {setting.said_by('sparse_ratio')} contradicts {setting.said_by('granularity')}: "
                f"that removes {(of - keep) / of:g}. Set sparse_ratio: null."
            )
        setting.sparse_ratio = (of - keep) / of
    elif setting.sparse_threshold is None and "sparse_ratio" not in setting.sources:
        if config.sparse_ratio is None:
            raise UserError(f"{where} sets no sparse_ratio for {setting.name}, nor does pruning.sparse_ratio. Set one.")
        setting.sparse_ratio = entries.ratio(config.sparse_ratio, "pruning.sparse_ratio", below_one=True)
    if "method" not in setting.sources:
        if config.method is None:
            raise UserError(f"{where} sets no method for {setting.name}, nor does pruning.method. Set one.")
        setting.method = config.method
        setting.options = {**config.options, **setting.options}
    if setting.granularity == "default":
        setting.granularity = metric_class(setting.method, setting.sources.get("method", "pruning")).granularity


def _fit(setting: Setting, model: nn.Module) -> None:
    """What only the shape of the parameter tells."""
    shape = model.get_parameter(setting.parameter).shape
    kind = type(model.get_submodule(setting.module)).__name__
    if setting.align:
        return
    if setting.granularity == "in_channel" and len(shape) < 2:
        raise UserError(
            f"{setting.name}: {setting.said_by('granularity')}: a parameter of one dimension has no input channels. "
            "Use out_channel."
        )
    if not setting.by_units:
        Blocks.of(setting.granularity, shape, kind, f"{setting.name}: {setting.said_by('granularity')}")
        setting.dependency_group_id = None
    elif len(shape) < 2 and setting.dependency_group_id == "auto":
        setting.dependency_group_id = None  # the trace knows the channels of what makes them


def _add_bias(setting: Setting, model: nn.Module, merged: Merged) -> None:
    """The bias of an aligned weight follows the same mask; that of a weight whose rows are blocks follows the weight.
    Unless it is a target of its own."""
    module = model.get_submodule(setting.module)
    kind, shape = type(module).__name__, model.get_parameter(setting.parameter).shape
    if setting.target != "weight" or module._parameters.get("bias") is None or (setting.module, "bias") in merged:
        return
    if setting.align:
        if setting.granularity == "in_channel":
            return
        align = Align(setting.align.module_name or setting.module, setting.align.target_name, setting.align.dims[:1])
    else:
        out = channel_dim(kind, len(shape), "out_channel")
        if setting.by_units or setting.pattern or kind in OUT_DIM_1:
            return
        if not Blocks.of(setting.granularity, shape, kind, setting.name).covers_rows(out):
            return
        align = Align(setting.module, "weight", [out])
    sources = {"": setting.sources[""], "align": setting.sources.get("align", setting.sources[""])}
    merged[setting.module, "bias"] = Setting(setting.module, "bias", align=align, sources=sources)


def _model_order(modules: Modules) -> list[tuple[str, str]]:
    return [(name, p) for name, module in modules.modules.items() for p in module._parameters]
