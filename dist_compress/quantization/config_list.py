"""`quantization.config_list`: which tensors are targets, and how each of them is quantized.

Keys and their meaning follow the NNI 3.0 config list; `dist_compress.config_list` merges the entries, here is what is
quantization's own. Without any entry every convolution and linear layer is a target: its input and its weight. Calls
of functions are targets where an entry names them, and become modules for it (dist_compress.functions).
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from typing import Any

from torch import nn

from dist_compress import blocks, call_sites, method
from dist_compress.config import QuantizationConfig, merge
from dist_compress.config_list import Entry, Noun, in_model_order
from dist_compress.config_list import merge as merge_entries
from dist_compress.errors import UserError
from dist_compress.functions import Call
from dist_compress.layout import device_of
from dist_compress.quantization import apply_method, dtypes
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
)
from dist_compress.quantization.setting import Setting
from dist_compress.selection import Modules, weight_dims
from dist_compress.sites import Sites

LAYERS = tuple(f"{kind}{n}d" for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)) + ("Linear", "Conv1D")
NAMES = ("default", "per_tensor", "per_channel", "out_channel", "in_channel", "per_token")
APPLY = ("default", *apply_method.GIVEN)


class _Quantization(Noun[Setting]):
    setting = Setting
    takes_back = ("quant_dtype", "quant_scheme", "granularity", "apply_method", "fuse_names")
    belongs = {"method": "options", "apply_method": "apply_options"}
    method: str | None = None  # of targets for which no entry names one

    def values(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        for key, value in given.items():
            if key in self.takes_back and value is None:
                continue
            path = f"{where}.{key}"
            if key == "granularity":
                _check_granularity(value, path)
            elif key == "fuse_names":
                _check_fuse_names(value, path)
            elif key in ("options", "apply_options"):
                if not isinstance(value, dict):
                    whose = "method" if key == "options" else "apply_method"
                    raise UserError(f"{path}={value!r} must be a mapping of the options of the {whose}.")
            elif not isinstance(value, str):
                raise UserError(f"{path}={value!r} must be a name, such as int8 for quant_dtype.")
            elif key == "apply_method" and value not in APPLY and "." not in value:
                raise UserError(
                    f"{path}={value!r}: no such choice. Available: {', '.join(APPLY)}, or the dotted path of a file."
                )
            elif key == "quant_dtype" and value not in (*dtypes.DTYPES, "default"):
                raise UserError(f"{path}={value!r}: no such choice. Available: {', '.join(dtypes.DTYPES)}.")
            elif key == "quant_scheme" and value not in (*dtypes.SCHEMES, "default"):
                raise UserError(f"{path}={value!r}: no such choice. Available: {', '.join(dtypes.SCHEMES)}.")
        return given

    def usual(self, module: nn.Module, entry: Entry) -> list[str]:
        if isinstance(module, Call) and not self._only_parameters(entry):
            return ["_output_0"] if module.function == "softmax" else ["_input_"]
        if isinstance(module, nn.MultiheadAttention):
            weights = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]  # those that it has
            return weights if self._only_parameters(entry) else ["_input_0", "_input_1", "_input_2", *weights]
        layer, weight = type(module).__name__ in (*LAYERS, call_sites.HIDDEN), weight_dims(module) >= 2
        if self._only_parameters(entry):
            return ["weight"] if layer or weight else []
        return ["_input_0", "weight"] if layer else ["weight"] if weight else ["_output_0"]

    def unfit(self, modules: Modules, entry: Entry) -> str:
        if not entry.target_names and self._only_parameters(entry):
            return "no weight to quantize, and its method is for parameters only. Leave it out."
        wanted = " or ".join(entry.target_names) or "input, output or weight"
        return f"no {wanted} to quantize: it did not run on the example input."

    def _only_parameters(self, entry: Entry) -> bool:
        name = entry.values.get("method", self.method)
        key = f"{entry.where}.method" if "method" in entry.values else "quantization.method"
        return name is not None and not _kind(name, key).activations


QUANTIZATION = _Quantization()


def resolve(
    config: QuantizationConfig, model: nn.Module, sites: Sites, reduce_range: bool = False
) -> list[Setting]:
    """The targets in model order, every "default" settled. `reduce_range`: int8 weights have 7 bits. Local, the same on
    every rank. Raises UserError."""
    entries = config.config_list or [{"op_types": sorted({type(m).__name__ for m in model.modules()} & {*LAYERS})}]
    if not entries[0].get("op_types") and not config.config_list:
        raise UserError("quantization.config_list is empty and the model has no convolution or linear layer. Add one.")
    call_sites.open_attention(sites, entries)
    call_sites.expose(sites, *call_sites.asked_for(entries, model), QUANTIZATION.root)
    noun = copy.copy(QUANTIZATION)
    noun.method = config.method
    merged = merge_entries(noun, entries, config.default_settings, model, sites)
    call_sites.hide(model, {setting.module for setting in merged.values()})
    for setting in merged.values():
        if isinstance(model.get_submodule(setting.module), nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise UserError(f"{setting.sources['']} selects {setting.module}, a container. Name modules inside of it.")
        _settle(setting, config)
        if reduce_range and not setting.is_activation and setting.quant_dtype == "int8":
            setting.quant_dtype = "int7"
    return in_model_order(merged, model)


def _settle(setting: Setting, config: QuantizationConfig) -> None:
    """What no entry set."""
    if "method" not in setting.sources:
        if config.method is None:
            raise UserError(
                f"{setting.sources['']} sets no method for {setting.name}, nor does quantization.method. Set one."
            )
        setting.method, setting.options = config.method, {**config.options, **setting.options}
    kind = fake_quantize_class(setting)
    if setting.fuse_names and not kind.folds:
        raise UserError(
            f"{setting.name}: {setting.said_by('fuse_names')}, but {setting.said_by('method')} quantizes the weight as "
            "it is, beside its norm. Leave fuse_names out."
        )
    if setting.is_activation and not kind.activations:
        raise UserError(
            f"{setting.name}: {setting.said_by('method')} is for parameters only. Leave {setting.target} out of "
            f"{setting.sources['']}, or give it a method of its own in target_settings."
        )
    if setting.quant_dtype == "default":
        setting.quant_dtype = kind.activation_dtype if setting.is_activation else kind.weight_dtype
    dtype = dtypes.DTYPES[setting.quant_dtype]
    if setting.quant_scheme == "default":
        if not dtype.is_integer:
            setting.quant_scheme = "symmetric"
        elif setting.is_activation or not dtype.is_signed:
            setting.quant_scheme = "affine"
        else:
            setting.quant_scheme = kind.weight_scheme
    if setting.apply_method == "default":
        setting.apply_method = kind.apply_method
    elif kind.apply_method not in APPLY:
        raise UserError(
            f"{setting.name}: {setting.said_by('apply_method')}, but {setting.said_by('method')} has a rule of its "
            f"own, {kind.apply_method}. Leave apply_method out, or choose qat."
        )
    if setting.granularity == "default":
        setting.granularity = "per_tensor" if setting.is_activation else kind.weight_granularity


def fake_quantize_class(setting: Setting) -> type[FakeQuantize]:
    """That of the method of a target. Local. Raises UserError."""
    return _kind(setting.method, setting.said_by("method").partition("=")[0])


def _kind(name: str, key: str) -> type[FakeQuantize]:
    """The subclass of FakeQuantize that the file of a method defines."""
    module = method.load("quantization", key, name)
    found = [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, FakeQuantize) and kind.__module__ == module.__name__
    ]
    if len(found) != 1 or not hasattr(module, "Options"):
        raise UserError(
            f"{key}={name!r}: {module.__name__} must define one subclass of FakeQuantize and a dataclass "
            "`Options`, empty if need be."
        )
    return found[0]


def build(setting: Setting, model: nn.Module, sites: Sites) -> FakeQuantize:
    """The quantizer of a target, on the device of the model. Local. Raises UserError."""
    kind = fake_quantize_class(setting)
    options = importlib.import_module(kind.__module__).Options
    spec, shape = spec_of(setting, model, sites)
    spec.granularity.check(shape, f"{setting.name}: {setting.said_by('granularity')}")
    device = device_of(model)
    options_key = f"{setting.sources.get('options', 'quantization')}.options"
    return kind(spec, shape, merge(options, setting.options, options_key), device)


def spec_of(setting: Setting, model: nn.Module, sites: Sites) -> tuple[Spec, tuple[int, ...]]:
    """How a target is quantized, and its shape; whether blocks fit into it is not asked. Local. Raises UserError."""
    kind, module = fake_quantize_class(setting), model.get_submodule(setting.module)
    if setting.is_activation:
        shape: tuple[int, ...] = sites.site(setting.module, setting.target).shape
    else:
        shape = tuple(model.get_parameter(setting.path).shape)
    what = f"{setting.name}: {setting.said_by('granularity')}"
    granularity = _granularity(setting, shape, type(module).__name__, what)
    dtype = dtypes.find(setting.quant_dtype, setting.quant_scheme, f"{setting.name}: {setting.said_by('quant_scheme')}")
    if dtype.is_binary and not kind.binary:
        raise UserError(
            f"{setting.name}: {setting.said_by('quant_dtype')} with {setting.said_by('method')}: two signs have no "
            "range to be found. Choose method: bnn (or dorefa, for weights), or an integer such as int2."
        )
    masked = setting.apply_method == "qat_clamp_round"
    own = None
    if kind.apply_method in APPLY:
        place = setting.sources.get("apply_method", setting.sources[""])
        own = apply_method.find(setting.apply_method, setting.apply_options, dtype, place)
    return Spec(dtype, setting.quant_scheme, granularity, masked, setting.is_activation, own), shape


def _granularity(setting: Setting, shape: tuple[int, ...], kind: str, what: str) -> Granularity:
    value = setting.granularity
    if isinstance(value, list):
        kernel, mode, pad = value if isinstance(value[0], list) else (value, "front", 1)
        if len(kernel) > len(shape):
            raise UserError(f"{what} has {len(kernel)} sizes, but the tensor has {len(shape)} dimensions.")
        filling = [pad] * (len(shape) - len(kernel))
        sizes = (*filling, *kernel) if mode == "front" else (*kernel, *filling)
        if setting.is_activation and sizes[0] != -1:
            raise UserError(f"{what}: the first dimension of an activation is the batch, and must be taken whole: -1.")
        return PerBlock(sizes)
    if group := re.fullmatch(r"per_group\((\d+)\)", value):
        size = int(group[1])
        return PerBlock((*[-1] * (len(shape) - 1), size)) if setting.is_activation else PerGroup(size)
    if value == "per_tensor" or len(shape) < 2 and not setting.is_activation:
        return PerTensor()
    if value == "per_token":
        if not setting.is_activation:
            raise UserError(f"{what}: a parameter has per_tensor, out_channel, in_channel and per_group(size).")
        return PerToken()
    if setting.is_activation:
        if value != "per_channel" or len(shape) < 2:
            raise UserError(f"{what}: an activation has per_tensor, per_channel, per_token and per_group(size).")
        return PerChannel(1)
    return PerChannel(blocks.channel_dim(kind, len(shape), "in_channel" if value == "in_channel" else "out_channel"))


def _check_granularity(value: Any, path: str) -> None:
    if isinstance(value, str) and (value in NAMES or re.fullmatch(r"per_group\([1-9]\d*\)", value)):
        return
    if isinstance(value, list) and value:
        blocks.parse(value, path)
        return
    raise UserError(
        f"{path}={value!r}: allowed are {', '.join(NAMES)}, per_group(32) and the like, and block sizes such as [4, 4]."
    )


def _check_fuse_names(value: Any, path: str) -> None:
    good = isinstance(value, list) and all(
        isinstance(names, list) and len(names) >= 2 and all(isinstance(name, str) for name in names) for names in value
    )
    if not good:
        raise UserError(f"{path}={value!r} must be a list of lists of modules in a row, such as [[conv1, bn1, relu]].")


