"""Targets of module types of one's own, and what they are asked by default; `quantization.default_settings` in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_compress import config_list
from dist_compress.quantization.config_list import QUANTIZATION


def register_defaults(module_type: str | type[nn.Module], targets: Mapping[str, Mapping[str, Any]]) -> None:
    """Let `targets`, {name of a target: {key of the config list: value}}, be the targets of all modules of a type
    (its class or the name of the class) in this process. Replaces what was registered before; {} takes it back.

    Raises UserError for unknown keys and values out of range.
    """
    config_list.register(QUANTIZATION, module_type, targets)
