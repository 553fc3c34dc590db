"""What is refused: settings that do not go together, and calibration data that says nothing; and what is pointed out.
Everything is local, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_compress.errors import UserError
from dist_compress.projection import Projection
from dist_compress.quantization.config_list import fake_quantize_class
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.fuse import Fused
from dist_compress.quantization.observer import Observer
from dist_compress.quantization.setting import Setting
from dist_compress.target import Coupling


def one_kind(settings: Sequence[Setting]) -> None:
    """Raise UserError for methods that train beside ones that do not."""
    kinds = {setting.method: fake_quantize_class(setting).trains for setting in settings}
    if len(set(kinds.values())) > 1:
        late = " and ".join(name for name, trains in kinds.items() if not trains)
        raise UserError(
            f"quantization.config_list: methods {', '.join(kinds)} in one run: {late} quantizes a model whose "
            "training is over, the others train with their scales. Use one kind."
        )


def no_folded_norms(settings: Sequence[Setting], fused: Sequence[Fused]) -> None:
    """Raise UserError for targets in a norm that is folded: no tensor of the deployed model, nor is what goes in."""
    norms = {f.norm: f.layer for f in fused if f.norm}
    for setting in settings:
        if setting.module in norms and setting.target != "_output_0":
            raise UserError(
                f"{setting.sources['']}: {setting.path} is folded into {norms[setting.module]} and does not exist "
                "when the model is deployed. Leave it out; _output_0 is possible."
            )


def blocks(parameters: Mapping[str, FakeQuantize], coupling: Coupling, round_to: int) -> None:
    """Raise UserError where a block takes several entries of a dim of which any number may go."""
    shrinks = {(m.fqn, m.dim) for group in coupling.groups if not group.blocked for m in group.members}
    for path, quantizer in parameters.items():
        sizes = quantizer.spec.granularity.sizes(quantizer.shape)
        for dim, (n, k) in enumerate(zip(quantizer.shape, sizes, strict=True)):
            if 1 < k < n and round_to % k and (path, dim) in shrinks:
                raise UserError(
                    f"{path}: a scale for each {k} entries of dim {dim}, of which the shrink may leave any number. Set "
                    f"speedup.round_to={k} or a multiple, name it in speedup.keep if it is not to shrink, or choose "
                    "another granularity."
                )


def binary_whole(parameters: Mapping[str, FakeQuantize], projection: Projection) -> None:
    """Raise UserError for pruned weights of a dtype without a zero."""
    masked = projection.masks()
    for path, quantizer in parameters.items():
        if quantizer.spec.dtype.is_binary and projection.owner(path) in masked:
            raise UserError(
                f"{path}: quant_dtype=binary has no zero for its pruned weights. Prune channels that are shrunk "
                "away, exclude it from pruning, or choose another dtype such as int2."
            )


def binary_later(parameters: Mapping[str, FakeQuantize], said: str, shrink: int | None) -> None:
    """Raise UserError if a dtype without a zero would begin while weights are masked. `said`: when it begins."""
    for path, quantizer in parameters.items():
        if quantizer.spec.dtype.is_binary:
            raise UserError(
                f"{said}, before the model is shrunk at step {shrink}: quant_dtype=binary of {path} has no zero for "
                "weights that are pruned. Leave it null, raise it, or choose another dtype such as int2."
            )


def cut_off(quantizers: Mapping[str, FakeQuantize]) -> list[str]:
    """Lines for the user, of what lost its negative values."""
    return [
        f"{path}: what is negative becomes 0, {q.spec.dtype.name} begins there and {q.cut_off:.3g} was seen. "
        "Choose a signed dtype, or a method with a zero point such as lsq_plus"
        for path, q in quantizers.items()
        if q.cut_off < 0
    ]


def observed(path: str, observer: Observer | None) -> None:
    """Raise UserError unless something finite was seen of each block. From reduced counts."""
    if observer is None:
        return
    seen, bad = observer.counts.tolist()
    if bad:
        raise UserError(
            f"{path}: {bad} of {seen} values are NaN or infinite on the calibration data. The model or the data is "
            "broken; look at the float model first."
        )
    if observer.empty:
        raise UserError(
            f"{path}: no calibration data reached it ({seen} values seen). Raise quantization.calibration_steps, or "
            "exclude the module."
        )


def start(start: float | str, step: int, total_steps: int, trains: bool) -> None:
    """`quantization.start`, which is that step of the run."""
    if step < total_steps and not trains:
        raise UserError(
            f"quantization.start={start!r} is step {step} of {total_steps}, but the method is for a model whose "
            "training is over. Leave it null, or choose one that trains, such as qat."
        )
    if step > total_steps:
        raise UserError(f"quantization.start={start!r} is step {step}, but the run has {total_steps}. Lower it.")
