"""From the entries of a config list to the settings of targets.

What is asked of a target is merged key by key: the defaults of the module's type, then the entries in order, each with
its `target_settings` last. A later value wins, and what it overrides is noted. Everything here is local and the same on
every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic

from torch import nn

from dist_compress.config_list.checking import check
from dist_compress.config_list.defaults import Defaults
from dist_compress.config_list.entry import Entry, is_activation
from dist_compress.config_list.noun import Noun, S
from dist_compress.config_list.setting import Setting, shown
from dist_compress.errors import UserError
from dist_compress.selection import Modules, how_computed, type_name
from dist_compress.sites import Sites


def merge(
    noun: Noun[S],
    config_list: Sequence[Any],
    default_settings: Mapping[str, Any],
    model: nn.Module,
    sites: Sites | None = None,
) -> dict[tuple[str, str], S]:
    """{(module, target): what the list asks of it}. `sites`: where activations may be named; looked at only if they
    are. Raises UserError with the path of the key."""
    return _Merger(noun, default_settings, model, sites).merged(config_list)


def in_model_order(settings: Mapping[tuple[str, str], S], model: nn.Module) -> list[S]:
    """Module by module: inputs, parameters as they are registered, outputs."""
    order = {}
    for name, module in Modules(model).modules.items():
        own = [target for where, target in settings if where == name]
        sites = {side: sorted((t for t in own if t.startswith(side)), key=_natural) for side in ("_input_", "_output_")}
        for target in (*sites["_input_"], *module._parameters, *sites["_output_"]):
            order[name, target] = len(order)
    return [settings[key] for key in sorted(settings, key=order.__getitem__)]


def overrides(settings: Sequence[Setting]) -> list[str]:
    """What was overridden by what, one line for each pair of values with the targets it is about."""
    found: dict[tuple[str, str], list[str]] = {}
    for setting in settings:
        for pair in setting.overridden:
            found.setdefault(pair, []).append(setting.name)
    return [f"{new} overrides {old} for {_listed(names)}" for (new, old), names in found.items()]


class _Merger(Generic[S]):
    def __init__(
        self, noun: Noun[S], default_settings: Mapping[str, Any], model: nn.Module, sites: Sites | None
    ) -> None:
        self.noun, self.sites, self.modules = noun, sites, Modules(model)
        self.defaults = Defaults(noun, default_settings, self.modules)

    def merged(self, config_list: Sequence[Any]) -> dict[tuple[str, str], S]:
        settings: dict[tuple[str, str], S] = {}
        for number, given in enumerate(config_list):
            entry = check(self.noun, given, f"{self.noun.root}[{number}]")
            for module, targets in self._targets(entry).items():
                for target, names in targets.items():
                    if (module, target) not in settings:
                        settings[module, target] = self._by_default(module, target)
                    setting = settings[module, target]
                    for values, where in entry.asked_of(names):
                        _override(self.noun, setting, values, where)
                    setting.sources[""] = entry.where
        return settings

    def _by_default(self, module: str, target: str) -> S:
        setting = self.noun.setting(module, target)
        asked = self.defaults.of(self.modules.modules[module])
        for name in self._names_of(module, list(asked)).get(target, []):
            for values, where in asked[name]:
                _override(self.noun, setting, values, where)
        return setting

    def _names_of(self, module: str, names: Sequence[str]) -> dict[str, list[str]]:
        """{target: those of `names` that it goes by, the more general ones first}."""
        found: dict[str, list[str]] = {}
        for name in sorted(dict.fromkeys(names), key=lambda name: (not name.endswith("_"), name.count("."))):
            for target in self._meant(module, name):
                found.setdefault(target, []).append(name)
        return found

    def _meant(self, module: str, name: str) -> list[str]:
        """The targets of a module that a name means: none, one, or all sites for _input_ and the like."""
        if not is_activation(name):
            return [name] if self.modules.modules[module]._parameters.get(name) is not None else []
        if self.sites is None:
            raise UserError(f"{self.noun.root}: {name} needs an example input, by which the activations are found.")
        return [site.name for site in self.sites.meant(module, name)]

    def _targets(self, entry: Entry) -> dict[str, dict[str, list[str]]]:
        """{module: {target: names it goes by in the entry}} that an entry is about. Modules that a pattern finds
        besides are left out."""
        chosen = self.modules.chosen(entry.given, entry.where)
        found: dict[str, dict[str, list[str]]] = {}
        for name in chosen:
            usual = entry.target_names or self.defaults.names(self.modules.modules[name], entry)
            targets = self._names_of(name, usual)
            settings = self._names_of(name, list(entry.target_settings))
            for target in () if entry.target_names else settings:
                targets.setdefault(target, [])
            if targets:
                found[name] = {target: settings.get(target, []) for target in targets}
        self._check_targets_exist(entry, chosen, found)
        unfit = [name for name in chosen if name not in found]
        if unfit and (entry.given.get("op_types") or not entry.given.get("op_names_re") or not found):
            module = self.modules.modules[unfit[0]]
            why = how_computed(module)
            raise UserError(
                f"{entry.where} selects {unfit[0]} ({type_name(module)}), which has "
                f"{self.noun.unfit(self.modules, entry)}" + (f" Its weight is computed by {why}." if why else "")
            )
        return found

    def _check_targets_exist(
        self, entry: Entry, chosen: Sequence[str], found: Mapping[str, Mapping[str, list[str]]]
    ) -> None:
        """Every named target is one of a selected module, and none has settings that `target_names` leaves out."""
        for key in ("target_names", "target_settings"):
            for name in getattr(entry, key):
                if not any(self._meant(module, name) for module in chosen):
                    raise UserError(f"{entry.where}.{key}: {self._missing(name, chosen)}")
        for name in entry.target_settings:
            if not any(name in names for targets in found.values() for names in targets.values()):
                raise UserError(
                    f"{entry.where}.target_settings.{name}: {entry.where}.target_names={entry.target_names} leaves "
                    f"{name} out."
                )

    def _missing(self, name: str, chosen: Sequence[str]) -> str:
        if is_activation(name):
            assert self.sites is not None
            return f"no selected module has an activation {name!r}; {self.sites.inventory(chosen)}"
        have = sorted({p for m in chosen for p, _ in self.modules.modules[m].named_parameters(recurse=False)})
        return f"no selected module has a parameter {name!r}; they have {', '.join(have) or 'none'}."


def _override(noun: Noun[Any], setting: Setting, values: dict[str, Any], where: str) -> None:
    """Let `values`, written at `where`, win over what was said before."""
    own = where.partition(".target_settings.")[0]
    for key in noun.ids:
        old = getattr(setting, key)
        if {old, values.get(key)} & {None, "auto"} or old == values[key]:
            continue
        if setting.sources.get(key, own).startswith(noun.root) and setting.sources.get(key) != own:
            raise UserError(
                f"{setting.name} is put in two groups: {setting.said_by(key)} and "
                f"{where}.{key}={values[key]!r}. Exclude it from one entry, or set {key}: null there."
            )
    for key, belonging in noun.belongs.items():
        if key in values and belonging not in values:
            values = {**values, belonging: noun.setting.default(belonging)}
    for key in noun.alternatives:
        if values.get(key) is not None:
            for other in noun.alternatives:
                if other != key and values.get(other) is None and other in setting.sources:
                    _note(noun, setting, key, values[key], where, other)
                    _take_back(setting, other)
    for key, value in values.items():
        if key in setting.sources and getattr(setting, key) != value:
            _note(noun, setting, key, value, where, key)
        if key in noun.takes_back and value is None:
            _take_back(setting, key)
            continue
        setattr(setting, key, value)
        setting.sources[key] = where


def _note(noun: Noun[Any], setting: Setting, key: str, value: Any, where: str, old: str) -> None:
    """Remember that a value of the config list lost."""
    if setting.sources[old].startswith(noun.root) and not where.startswith(f"{setting.sources[old]}.target_settings."):
        setting.overridden.append((f"{where}.{key}={shown(value)}", setting.said_by(old)))


def _take_back(setting: Setting, key: str) -> None:
    setattr(setting, key, type(setting).default(key))
    setting.sources.pop(key, None)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which _input_2 comes before _input_10 and numbers before words."""
    parts = name.split("_", 2)[2].split(".")
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
