"""torchao: the model with weights of torchao's tensor types, whose kernels compute with integers and 8-bit floats.

    model.torchao.safetensors     integers and scales; in its header what they are, as JSON: torchao's own format

    weight of a Linear, Embedding or Conv2d        input of a Linear                becomes
    int7, int8, a scale for each row or group      float                            Int8Tensor
    int7, int8, a scale for each row, symmetric    8 bits, per_token or per_tensor  Int8Tensor
    int2 to int8, blocks of any shape              float                            IntxUnpackedToInt8Tensor
    int2 to int8, blocks of any shape              8 bits, affine, per_token        IntxUnpackedToInt8Tensor
    fp8, blocks of any shape                       float                            Float8Tensor
    fp8, a scale for each row                      fp8, per_token                   Float8Tensor

Anything else is refused. `load` builds the model again, without pickle.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.export import safetensors
from dist_compress.export.parts import agreement
from dist_compress.export.parts.call import outputs
from dist_compress.quantization import convert, deploy
from dist_compress.quantization.fake_quant import FakeQuantize, Spec
from dist_compress.quantization.granularity import PerChannel, PerGroup, PerTensor, PerToken
from dist_compress.sites import Sites
from dist_compress.speedup.plan import Plan

FILE = "model.torchao.safetensors"
KEY = "export=[torchao]"
NUM_CHECKED = agreement.NUM_CHECKED
NOT_RUN = "NOT RUN: products of 8-bit floats need a GPU of compute capability 8.9"
log = logging.getLogger(__name__)


def ready(model: nn.Module, targets: Mapping[tuple[str, str], Spec], example: Any) -> None:
    """Raise UserError unless torchao is there and has a type for every target. Rank 0 only."""
    _available()
    _types(model, targets)


def export(run_dir: str | Path, model: nn.Module, plan: Plan | None, config: Config, example: Any) -> None:
    """Writes `run_dir`/model.torchao.safetensors, whole or not at all. Rank 0 only. Raises UserError."""
    _available()
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    found = deploy.quantizers(model)
    types, sites = _types(model, {place: q.spec for place, q in found.items()}), Sites(model, *example)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = deploy.without_quantizers(model).state_dict()
    state = {name: state[name].detach().cpu() for name in kept if name in state}
    for (module, target), q in found.items():
        if target == "weight":
            source = found.get((module, "_input_0"))
            num_dims = len(sites.site(module, "_input_0").shape) if source else 0
            weight = model.get_parameter(f"{module}.weight")
            name = next(name for name, parameter in model.named_parameters() if parameter is weight)
            state[name] = _tensor(types[module], weight.detach(), q, source, num_dims)
    tensors, header = flatten_tensor_state_dict({name: tensor for name, tensor in state.items() if "." in name})
    tensors |= {name: tensor for name, tensor in state.items() if "." not in name}  # its format has no place for them
    path = Path(run_dir) / FILE
    draft = path.with_suffix(".part")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, draft, metadata=header)
    os.replace(draft, path)


def load(folder: str | Path, model: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """The model in a folder with torchao's weights in it, in evaluation mode on the CPU. Local.

    `model`: of the shape of the one that was exported, float or not, with any weights; else it is built as
    `dist_compress.load(folder, trust)` does, which takes export=[safetensors,torchao]. Raises UserError.
    """
    _available()
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    built = deploy.without_quantizers(safetensors.load(folder, trust) if model is None else model)
    built = built.cpu().eval().requires_grad_(False)
    path = Path(folder).expanduser() / FILE
    try:
        with safe_open(path, "pt") as file:
            tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        state, rest = unflatten_tensor_state_dict(tensors, header)
        for name, tensor in {**rest, **state}.items():
            _put(built, name, tensor)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"load({str(path)!r}): it does not fit the model, or is no such file: {error}") from error
    return built


def check(run_dir: str | Path, model: nn.Module, example: Any) -> dict[str, Any]:
    """The loaded model against `model`, on its device. Rank 0 only.

    Every integer, and every weight they stand for, has to be that of the run: "num_integers"; then what
    `agreement.check` finds, or {"kernels": "NOT RUN: ..."}. Raises RuntimeError.
    """
    path = Path(run_dir) / FILE
    loaded = load(run_dir, model)
    held = {name: p.qdata for name, p in loaded.named_parameters() if hasattr(p, "qdata")}  # type: ignore[attr-defined]
    biases = {n: convert.integers_of(loaded.get_parameter(n), q) for n, q in _biases(model).items()}
    count = convert.compare_integers(model, {**held, **biases}, KEY, path)
    for name in held:
        weight: Any = loaded.get_parameter(name)
        if not torch.equal(weight.dequantize(), model.get_parameter(name).detach().cpu()):
            raise RuntimeError(f"{KEY}: what torchao makes of the integers of {name} in {path} is another weight.")
    device = next(model.parameters()).device
    if _needs_gpu(loaded) and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        log.warning("%s: %s. Integers and weights were compared.", KEY, NOT_RUN)
        return {"num_integers": float(count), "kernels": NOT_RUN}
    loaded = loaded.to(device)
    found = agreement.check(lambda call: outputs(loaded, call), model, example, KEY, path)
    return {**found, "num_integers": float(count)}


def _types(model: nn.Module, targets: Mapping[tuple[str, str], Spec]) -> dict[str, str]:
    """{module: the name of torchao's type for its weight}. Raises UserError for what has none."""
    if not targets:
        raise UserError(f"{KEY}: nothing is quantized, so torchao has nothing to hold. Set quantization.method.")
    types = {}
    for (module, target), spec in targets.items():
        what = f"{KEY}: {module}.{target} is quantized to {spec.dtype.name}, {spec.scheme}, {spec.granularity}"
        if target == "weight":
            kind = type(model.get_submodule(module))
            types[module], reason = _type(kind, spec, targets.get((module, "_input_0")))
        elif target == "bias":
            reason = ""  # it stays float, with the values it was rounded to
        elif target != "_input_0" or (module, "weight") not in targets:
            reason = "only weights, and inputs of layers whose weights are quantized, can be"
        else:
            reason = ""
        if reason or not module:
            raise UserError(f"{what}: {reason or 'the model is that layer itself'}. Leave it out, or export=[onnx].")
    return types


def _type(kind: type[nn.Module], weight: Spec, source: Spec | None) -> tuple[str, str]:
    """(name of the type, "") or ("", why there is none)."""
    dtype, granularity = weight.dtype, weight.granularity
    rows = isinstance(granularity, PerTensor) or granularity == PerChannel(0)
    if kind not in (nn.Linear, nn.Embedding, nn.Conv2d):
        return "", f"torchao has weights of Linear, Embedding and Conv2d, not of {kind.__name__}"
    if source is not None and kind is not nn.Linear:
        return "", f"torchao quantizes inputs of Linear only, not of {kind.__name__}: target its weight alone"
    if dtype.is_float:
        if kind is nn.Conv2d:
            return "", "torchao has no CPU kernel for 8-bit float convolutions: use int8"
        if source is None or rows and source.dtype == dtype and isinstance(source.granularity, PerToken):
            return "Float8Tensor", ""
        return "", "8-bit float weights with a scale for each row go with inputs of the same type per_token"
    if not dtype.is_signed or dtype.num_levels > 256:
        return "", "torchao has signed integers of up to 8 bits"
    symmetric, wide = weight.scheme != "affine", dtype.num_levels > 64
    if source is not None and (source.dtype.is_float or source.dtype.num_levels != 256):
        return "", f"its input is {source.dtype.name}, {source.scheme}; torchao takes all of int8 or uint8"
    if source is None:
        int8 = symmetric and wide and kind is nn.Linear and (rows or isinstance(granularity, PerGroup))
        return ("Int8Tensor" if int8 else "IntxUnpackedToInt8Tensor"), ""
    if symmetric and rows and isinstance(source.granularity, PerToken | PerTensor):
        return "Int8Tensor", ""
    if isinstance(source.granularity, PerToken) and source.scheme == "affine":
        return "IntxUnpackedToInt8Tensor", ""
    return "", f"its input is {source.scheme}, {source.granularity}; beside such a weight it takes per_token affine"


def _tensor(name: str, weight: torch.Tensor, q: FakeQuantize, source: FakeQuantize | None, num_dims: int) -> Any:
    """torchao's tensor of a weight, on the CPU, with the integers and scales of `q`."""
    from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor, MappingType
    from torchao.quantization import PerRow as Row
    from torchao.quantization import PerTensor as Whole
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

    blocks, integers = list(q.spec.granularity.sizes(weight.shape)), convert.integers_of(weight, q).cpu()
    shape = [n // k for n, k in zip(weight.shape, blocks, strict=True)]
    scale, zero_point = q.scale.detach().cpu().reshape(shape), q.zero_point.cpu().reshape(shape).to(torch.int8)
    if name == "Float8Tensor":
        rows = QuantizeTensorToFloat8Kwargs(float8_dtype=integers.dtype, granularity=Row())
        given = {"act_quant_kwargs": None if source is None else rows, "dtype": weight.dtype}
        return Float8Tensor(integers, scale, blocks, **given)
    if name == "IntxUnpackedToInt8Tensor":
        bits = (q.spec.dtype.num_levels - 1).bit_length()
        per_token = None if source is None else "int8_asym_per_token"
        dtype = getattr(torch, f"int{bits}")
        return IntxUnpackedToInt8Tensor(integers, scale, zero_point, dtype, blocks, weight.dtype, per_token)
    if source is None:
        return Int8Tensor(integers, scale, blocks, weight.dtype)
    how = MappingType.ASYMMETRIC if source.spec.scheme == "affine" else MappingType.SYMMETRIC
    if isinstance(source.spec.granularity, PerToken):
        kind = QuantizeTensorToInt8Kwargs(Row(), how)
        return Int8Tensor(integers, scale, blocks, weight.dtype, act_quant_kwargs=kind)
    shift = 0 if source.spec.dtype.is_signed else 128  # torchao's are signed
    one = [1] * num_dims
    return Int8Tensor(
        integers, scale, blocks, weight.dtype, act_quant_scale=source.scale.detach().cpu().reshape(one),
        act_quant_zero_point=(source.zero_point.cpu() - shift).to(torch.int8).reshape(one),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(Whole(), MappingType.ASYMMETRIC),
    )  # fmt: skip


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """In the place of a parameter, wherever it is shared, or of a buffer."""
    module, _, own = name.rpartition(".")
    if own in model.get_submodule(module)._buffers:
        model.get_submodule(module)._buffers[own] = tensor
        return
    held, new = model.get_parameter(name), nn.Parameter(tensor, requires_grad=False)
    if held.shape != new.shape:
        raise ValueError(f"{name} has shape {list(held.shape)}, in the file {list(new.shape)}")
    for owner in model.modules():
        for key, value in list(owner._parameters.items()):
            if value is held:
                owner._parameters[key] = new


def _biases(model: nn.Module) -> dict[str, FakeQuantize]:
    return {f"{module}.bias": q for (module, target), q in deploy.quantizers(model).items() if target == "bias"}


def _needs_gpu(model: nn.Module) -> bool:
    kinds = {type(p).__name__ for p in model.parameters() if getattr(p, "act_quant_kwargs", None) is not None}
    return "Float8Tensor" in kinds


def _available() -> None:
    try:
        from torchao.quantization import Int8Tensor  # noqa: F401
    except ImportError as error:
        why = f"{KEY}: torchao is missing or too old ({error})."
        raise UserError(f"{why} pip install 'dist_compress[torchao]'.") from None
