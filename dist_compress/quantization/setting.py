"""What is asked of one target of quantization: a parameter, or a tensor that goes into or comes out of a module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dist_compress import config_list
from dist_compress.config_list import is_activation


@dataclass
class Setting(config_list.Setting):
    """One target; the values of all entries that name it, merged key by key. "default" is settled by `resolve`."""

    NOUN = "quantization"
    INHERITED = ("method", "options")

    quant_dtype: str = "default"
    quant_scheme: str = "default"
    granularity: Any = "default"
    apply_method: str = "default"
    apply_options: dict[str, Any] = field(default_factory=dict)
    fuse_names: list[list[str]] = field(default_factory=list)
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_activation(self) -> bool:
        return is_activation(self.target)

    @property
    def buffer(self) -> str:
        """The name of its quantizer, a submodule of the target's module: quantizer_input_0, quantizer_weight."""
        return f"quantizer_{self.target.strip('_').replace('.', '_')}"
