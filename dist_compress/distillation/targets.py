"""`distillation.config_list`: which tensors inside the student are compared with which of the teacher's, and how.

Keys follow the NNI 3.0 config list: `lambda` weighs a target's loss, `link` names modules of the teacher,
`apply_method` says how two tensors are compared. `dist_compress.config_list` merges the entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dist_compress import config_list
from dist_compress.config import DistillationConfig
from dist_compress.config_list import Entry, Noun, in_model_order, is_activation, merge
from dist_compress.errors import UserError
from dist_compress.selection import Modules
from dist_compress.sites import Sites

AUTO = "auto"


@dataclass
class Setting(config_list.Setting):
    """What is asked of one target of the student."""

    NOUN = "distillation"

    method: str | None = None  # a file of distillation/methods; None: distillation.method
    options: dict[str, Any] = field(default_factory=dict)
    lambda_: float = 1.0  # `lambda` in a config list
    link: str | list[str] = AUTO  # modules of the teacher, or their targets: layer1, layer1._input_0; auto: same name
    apply_method: str = "mse"  # mse | kl, or the dotted path of a function

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        return tuple(key.rstrip("_") for key in super().keys())

    @property
    def links(self) -> list[str]:
        return [self.link] if isinstance(self.link, str) else self.link


class _Distillation(Noun[Setting]):
    setting = Setting
    belongs = {"method": "options"}

    def values(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        kinds = {"method": str, "options": dict, "apply_method": str}
        for key, kind in kinds.items():
            if key in given and not isinstance(given[key], kind):
                raise UserError(f"{where}.{key}={given[key]!r} must be a {kind.__name__}.")
        weight = given.get("lambda", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"{where}.lambda={weight!r} must be a number, at least 0.")
        link = given.get("link", AUTO)
        names = link if isinstance(link, list) else [link]
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}.link={link!r} must name a module of the teacher, or be a list of such, or auto.")
        return {"lambda_" if key == "lambda" else key: value for key, value in given.items()}

    def check_target(self, name: str, what: str) -> None:
        if not is_activation(name):
            raise UserError(f"{what}: only activations are compared: _output_0, _input_0, _output_logits and the like.")

    def usual(self, module: nn.Module, entry: Entry) -> list[str]:
        return ["_output_0"]

    def unfit(self, modules: Modules, entry: Entry) -> str:
        return f"no {' or '.join(entry.target_names or ['_output_0'])}. Name its tensors in target_names."


DISTILLATION = _Distillation()


def wanted(config: DistillationConfig) -> bool:
    """Whether the section asks for a method anywhere. Local."""
    return config.method is not None or bool(config.config_list)


def resolve(config: DistillationConfig, model: nn.Module, sites: Sites) -> list[Setting]:
    """The targets in model order. Local, the same on every rank. Raises UserError."""
    settings = in_model_order(merge(DISTILLATION, config.config_list, {}, model, sites), model)
    for setting in settings:
        if setting.method is None:
            setting.method, setting.options = config.method, {**config.options, **setting.options}
    return settings
