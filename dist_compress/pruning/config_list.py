"""`pruning.config_list`: which parameters and activations are targets, and what each of them is asked for.

Keys and their meaning follow the NNI 3.0 config list. `dist_compress.config_list` merges the entries; here is what is
pruning's own. `sparse_ratio`, `sparse_threshold` and `align` answer one question, so a later one also takes the place
of an earlier other one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_compress.blocks import OUT_DIM_1, Blocks, channel_dim
from dist_compress.config import PruningConfig
from dist_compress.config_list import Entry, Noun, in_model_order, is_activation, merge
from dist_compress.errors import UserError
from dist_compress.pruning import entry as entries
from dist_compress.pruning.checks import check_global_groups, check_kind, check_limited, check_whole, has_limit
from dist_compress.pruning.metric import metric_class
from dist_compress.pruning.setting import AT_MOST, Align, Setting
from dist_compress.selection import Modules, weight_dims
from dist_compress.sites import Sites

Merged = dict[tuple[str, str], Setting]


class _Pruning(Noun[Setting]):
    setting = Setting
    takes_back = entries.TAKES_BACK
    ids = ("global_group_id", "dependency_group_id")
    alternatives = ("sparse_ratio", "sparse_threshold", "align")
    belongs = {"method": "options", "apply_method": "apply_options"}

    def values(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        return entries.values_of(given, where)

    def usual(self, module: nn.Module, entry: Entry) -> list[str]:
        return ["weight"] if weight_dims(module) >= (1 if entry.values.get("align") else 2) else []

    def unfit(self, modules: Modules, entry: Entry) -> str:
        wanted = entry.target_names
        least = 1 if entry.values.get("align") or wanted or entry.target_settings else 2
        lacks = f"no parameter {' or '.join(wanted)}" if wanted else f"no weight of {least} or more dimensions"
        return f"{lacks} to prune. Prunable types in this model: {modules.prunable_types(least)}."


PRUNING = _Pruning()


def resolve(config: PruningConfig, model: nn.Module, sites: Sites | None = None) -> list[Setting]:
    """The targets and aligned parameters in model order. Local, the same on every rank. Raises UserError."""
    if not config.config_list:
        raise UserError(
            f"{PRUNING.root} is empty: add an entry such as {{op_types: [Conv2d]}}, or set pruning.method=null."
        )
    merged = merge(PRUNING, config.config_list, config.default_settings, model, sites)
    for setting in merged.values():
        _inherit(setting, config)
        check_kind(setting)
        check_whole(setting)
        _name_site(setting, sites)
    for setting in list(merged.values()):
        if setting.activation:
            continue
        _fit(setting, model)
        _add_bias(setting, model, merged)
    settings = in_model_order(merged, model)
    check_limited(settings, config)
    check_global_groups(settings)
    return settings


def _inherit(setting: Setting, config: PruningConfig) -> None:
    """What no entry set."""
    where = setting.sources[""]
    if setting.align:
        return
    if "method" not in setting.sources:
        if config.method is None:
            raise UserError(f"{where} sets no method for {setting.name}, nor does pruning.method. Set one.")
        setting.method = config.method
        setting.options = {**config.options, **setting.options}
    if setting.granularity == "default":
        by_method = metric_class(setting.method, setting.sources.get("method", "pruning")).granularity
        setting.granularity = "per_channel" if setting.activation and by_method == "out_channel" else by_method
    if setting.pattern:
        keep, of = setting.pattern
        if "sparse_ratio" in setting.sources and setting.sparse_ratio != (of - keep) / of:
            raise UserError(
                f"{setting.name}: {setting.said_by('sparse_ratio')} contradicts {setting.said_by('granularity')}: "
                f"that removes {(of - keep) / of:g}. Set sparse_ratio: null."
            )
        setting.sparse_ratio = (of - keep) / of
    elif setting.sparse_threshold is None and "sparse_ratio" not in setting.sources and has_limit(config):
        setting.sources[AT_MOST] = AT_MOST
    elif setting.sparse_threshold is None and "sparse_ratio" not in setting.sources:
        if config.sparse_ratio is None:
            raise UserError(
                f"{where} sets no sparse_ratio for {setting.name}, nor does pruning.sparse_ratio. Set one, or "
                "pruning.at_most."
            )
        setting.sparse_ratio = entries.ratio(config.sparse_ratio, "pruning.sparse_ratio", below_one=True)


def _name_site(setting: Setting, sites: Sites | None) -> None:
    """The activation that a target is aligned with, by the name that settings have."""
    if setting.activation and setting.dependency_group_id == "auto":
        setting.dependency_group_id = None  # the trace knows channels of parameters
    align = setting.align
    if align is None or not is_activation(align.target_name):
        return
    found = sites.meant(align.module_name or setting.module, align.target_name) if sites else []
    if len(found) != 1:
        several = f"means {', '.join(site.name for site in found)}; name one" if found else "is no activation there"
        where = f"{setting.sources['align']}.align.target_name={align.target_name!r}"
        raise UserError(f"{setting.name}: {where} {several}.")
    setting.align = Align(align.module_name, found[0].name, align.dims)


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
