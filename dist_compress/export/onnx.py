"""ONNX: the model as a graph that runs without Python; quantized with QuantizeLinear and DequantizeLinear.

    model.onnx     opset 21, dynamic batch size; integers of weights and int32 biases as the fake quantizers made them

The check runs the file with ONNX Runtime on held-out samples, compares with the model of the run, and looks at every
integer in the file. A float model can be exported, too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.export.parts import agreement, onnx_file
from dist_compress.export.parts.call import Call, moved, named, outputs
from dist_compress.export.parts.program import program, quiet
from dist_compress.quantization import convert, deploy
from dist_compress.quantization.fake_quant import Spec
from dist_compress.speedup.plan import Plan

FILE = "model.onnx"
KEY = "export=[onnx]"
OPSET = 21  # of blocks, and of integers of 4 and 16 bits
NUM_CHECKED = agreement.NUM_CHECKED


def ready(model: nn.Module, targets: Mapping[tuple[str, str], Spec], example: Any) -> None:
    """Raise UserError unless the libraries are there and the float model can be exported. Rank 0 only."""
    for (module, target), spec in targets.items():
        if spec.is_activation and spec.dtype.is_binary:
            raise UserError(
                f"{KEY}: {module}.{target} is quantized to binary, and no operator of ONNX takes the sign of an "
                "activation. Choose another quant_dtype for it, or leave the format out."
            )
    with tempfile.TemporaryDirectory() as folder:
        export(folder, model, None, Config(), example)
        session(Path(folder) / FILE)


def export(run_dir: str | Path, model: nn.Module, plan: Plan | None, config: Config, example: Any) -> None:
    """Writes `run_dir`/model.onnx, whole or not at all. Rank 0 only. Raises UserError for what ONNX cannot hold."""
    _available()
    from dist_compress.export.parts import onnx_ops

    copied = convert.convert(deepcopy(model).cpu(), onnx_ops.Linear())
    traced = program(copied, example, KEY)
    try:
        with quiet():
            written = torch.onnx.export(
                traced, dynamo=True, opset_version=OPSET, verbose=False, output_names=_output_names(copied, example),
                custom_translation_table=onnx_ops.translations(),
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{KEY}: ONNX cannot hold {type(model).__name__}: {reason} Leave the format out.") from error
    assert written is not None
    path = Path(run_dir) / FILE
    draft = path.with_suffix(".part")
    written.save(draft, external_data=False)
    parameters = {target: q for target, q in deploy.quantizers(model).items() if not q.spec.is_activation}
    onnx_file.tidy(draft, {".".join(target).strip("."): bits(q.spec) for target, q in parameters.items()})
    os.replace(draft, path)


def bits(spec: Spec) -> int:
    """That numbers of a dtype need."""
    levels = spec.dtype.quant_max - spec.dtype.quant_min
    return onnx_file.WIDE if spec.dtype.is_float or 2**8 <= levels < 2**16 else levels.bit_length()


def check(run_dir: str | Path, model: nn.Module, example: Any) -> dict[str, float]:
    """What ONNX Runtime makes of the file, against `model` on `example`. Rank 0 only.

    What `agreement.check` finds; of a quantized model "num_integers" besides, those of weights and biases, compared
    one by one. Raises RuntimeError where they differ too much.
    """
    path = Path(run_dir) / FILE
    runs = session(path)
    found = agreement.check(lambda call: _run(runs, call), model, example, KEY, path)
    if not deploy.quantizers(model):
        return found
    held = onnx_file.integers(path)
    return {**found, "num_integers": float(convert.compare_integers(model, held, KEY, path))}


def session(path: str | Path, num_threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU, on `num_threads` threads; 0: as many as it likes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = num_threads
    # Weights of few bits are multiplied with float activations; the default quantizes these, too, unasked.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Runtime(nn.Module):
    """A file as something that is called like the model, on one thread: what is timed. On the CPU."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.session = session(path, num_threads=1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.session.run(None, feed(self.session, (args, kwargs)))


def feed(runs: Any, call: Call) -> dict[str, Any]:
    """The tensors of a call by the names of the inputs of a session."""
    tensors = [leaf for leaf in tree_leaves(moved(call, "cpu")) if isinstance(leaf, torch.Tensor)]
    return dict(zip([i.name for i in runs.get_inputs()], [t.numpy() for t in tensors], strict=True))


def _run(runs: Any, call: Call) -> dict[str, torch.Tensor]:
    names = [output.name for output in runs.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, runs.run(names, feed(runs, call))), strict=True))


def _output_names(model: nn.Module, example: Any) -> list[str]:
    return list(named(outputs(model, example)))


def _available() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{KEY}: {error.name} is missing. pip install 'dist_compress[onnx]'.") from None
