"""From a config list to quantizers: one for each target, and what of the model they quantize as one."""

from __future__ import annotations

from dataclasses import dataclass

from dist_compress import comm
from dist_compress.config import QuantizationConfig
from dist_compress.quantization import checks, cpu, fuse, preparing
from dist_compress.quantization.config_list import build, fake_quantize_class, resolve
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.setting import Setting
from dist_compress.sites import Sites


@dataclass(frozen=True)
class Targets:
    """All of a run, in model order; the same on every rank."""

    settings: list[Setting]
    activations: dict[str, FakeQuantize]  # by path
    parameters: dict[str, FakeQuantize]
    fused: dict[str, fuse.Fused]  # by the layer that comes first
    reduced: bool  # int8 weights have 7 bits


def collect(config: QuantizationConfig, sites: Sites, exports_onnx: bool) -> Targets:
    """Nothing is put into the model yet. Collective. Raises UserError."""
    reduced = config.reduce_range
    if reduced is None:
        reduced = comm.on_rank0(cpu.needs_reduced_range) and exports_onnx
    settings = resolve(config, sites.model, sites, reduced)
    checks.one_kind(settings)
    layers = [s.module for s in settings if s.target == "weight" and fake_quantize_class(s).folds]
    wanted = [names for s in settings for names in s.fuse_names]
    fused = {f.layer: f for f in comm.on_rank0(lambda: fuse.find(sites, layers, wanted))}
    checks.no_folded_norms(settings, list(fused.values()))
    found = Targets(settings, {}, {}, fused, reduced)
    for setting in settings:
        quantizer, where = build(setting, sites.model, sites), setting.module
        if setting.target == "_output_0" and where in fused:
            where = fused[where].last  # what the fused kernel puts out
        quantizer.place = where, setting.target
        (found.activations if setting.is_activation else found.parameters)[setting.path] = quantizer
    preparing.check(sites.model, found.parameters)
    return found
