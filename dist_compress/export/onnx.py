"""ONNX: the model as a graph that runs without Python; quantized with QuantizeLinear and DequantizeLinear.

    model.onnx     opset 21, dynamic batch size; int8 weights and int32 biases as the fake quantizers made them

The check runs the file with ONNX Runtime on held-out samples, compares with the model of the run, and looks at every
integer in the file. A float model can be exported, too.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.quantization import convert, deploy
from dist_compress.speedup.plan import Plan

FILE = "model.onnx"
OPSET = 21
NUM_CHECKED = 64  # held-out samples
MAX_DIFF = 8.0  # largest difference of an output that may ship, in units of 1 / 255 of the range of the outputs
AGREEMENT = 0.98  # smallest share of samples with the same top-1 that may ship
FLOAT_DIFF = 1e-3  # of a float model, relative


def available() -> None:
    """Raise UserError unless the libraries are there. Local."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"export=[onnx]: {error.name} is missing. pip install 'dist_compress[onnx]'.") from None


def export(run_dir: str | Path, model: nn.Module, plan: Plan | None, config: Config, example: Any) -> None:
    """Writes `run_dir`/model.onnx, whole or not at all. Rank 0 only. Raises UserError for what ONNX cannot hold."""
    available()
    convert.check(model, "export=[onnx]")
    args, kwargs = _moved(example, torch.device("cpu"))
    program = _quietly(
        lambda: torch.onnx.export(
            convert.convert(model).cpu(), args, kwargs=kwargs, dynamo=True, opset_version=OPSET, verbose=False,
            dynamic_shapes=_batch_is_free(args, kwargs),
        )
    )  # fmt: skip
    path = Path(run_dir) / FILE
    draft = path.with_suffix(".part")
    program.save(draft, external_data=False)
    _name_parameters(draft)
    os.replace(draft, path)


def check(run_dir: str | Path, model: nn.Module, example: Any) -> dict[str, float]:
    """What ONNX Runtime makes of the file, against `model` on `example`. Rank 0 only.

    {"max_rel_diff"} of a float model; of a quantized one {"max_diff": in units of 1 / 255 of the range of the outputs,
    "top1_agreement": share of samples, "num_integers": of weights and biases, compared one by one}. Raises RuntimeError
    where they differ too much.
    """
    import numpy as np
    import onnxruntime

    args, kwargs = _moved(example, torch.device("cpu"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(Path(run_dir) / FILE), options, providers=["CPUExecutionProvider"])
    given = dict(zip([i.name for i in session.get_inputs()], tree_leaves((args, kwargs)), strict=True))
    found = torch.from_numpy(np.asarray(session.run(None, {k: v.numpy() for k, v in given.items()})[0])).double()
    training = model.training
    device = next(model.parameters()).device
    on_device = _moved(example, device)
    with torch.no_grad():
        outputs = model.eval()(*on_device[0], **on_device[1])
    model.train(training)
    wanted = next(x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)).double().cpu()
    worst = float((wanted - found).abs().max())
    if not deploy.quantizers(model):
        relative = worst / float(wanted.abs().max().clamp(min=1e-30))
        _refuse(relative <= FLOAT_DIFF, run_dir, f"differs by {relative:.3g} (relative; at most {FLOAT_DIFF:g})")
        return {"max_rel_diff": relative}
    unit = float(wanted.max() - wanted.min()) / 255
    same = float((wanted.argmax(-1) == found.argmax(-1)).double().mean())
    _refuse(worst / unit <= MAX_DIFF, run_dir, f"differs by {worst / unit:.3g} units (at most {MAX_DIFF:g})")
    _refuse(same >= AGREEMENT, run_dir, f"agrees in {same:.1%} of the samples (at least {AGREEMENT:.0%})")
    return {"max_diff": worst / unit, "top1_agreement": same, "num_integers": float(_compare_integers(run_dir, model))}


def _compare_integers(run_dir: str | Path, model: nn.Module) -> int:
    """The number of integers in the file, each of which is the fake quantizer's. Raises RuntimeError."""
    import onnx

    held = {t.name: t for t in onnx.load(Path(run_dir) / FILE).graph.initializer}
    count = 0
    for (module, target), q in deploy.quantizers(model).items():
        if q.spec.is_activation:
            continue
        name = f"{module}.{target}"
        wanted = convert.integers_of(model.get_parameter(name), q).cpu()
        found = torch.from_numpy(onnx.numpy_helper.to_array(held[name]).copy()) if name in held else None
        if found is None or found.dtype != wanted.dtype or not torch.equal(found, wanted):
            raise RuntimeError(f"export=[onnx]: the integers of {name} in {run_dir} are not those of the run.")
        count += wanted.numel()
    return count


def _name_parameters(path: Path) -> None:
    """Give parameters the names they have in the model."""
    import onnx

    graph = onnx.load(path)
    names = {t.name: t.name.replace(".parametrizations", "").removesuffix(".original") for t in graph.graph.initializer}
    for tensor in graph.graph.initializer:
        tensor.name = names[tensor.name]
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    onnx.save(graph, path)


def _refuse(good: bool, run_dir: str | Path, what: str) -> None:
    if not good:
        raise RuntimeError(f"export=[onnx]: ONNX Runtime's output of {Path(run_dir) / FILE} {what}. It must not ship.")


def _moved(example: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = example
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return tuple(move(x) for x in args), {k: move(v) for k, v in (kwargs or {}).items()}


def _batch_is_free(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | tuple[Any, ...] | None:
    batch = torch.export.Dim("batch", min=1)
    free = lambda x: {0: batch} if isinstance(x, torch.Tensor) and x.dim() else None  # noqa: E731
    if kwargs and not args:
        return {key: free(value) for key, value in kwargs.items()}
    return tuple(free(x) for x in args) if not kwargs else None


def _quietly(fn: Any) -> Any:
    """Without the exporter's own talk."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fn()
    finally:
        logging.disable(level)
