"""The small model as plain files: architecture by name, plan, weights. Nothing in them is pickled.

    model.json          how to build the dense architecture (models.describe), its number of classes; of a loop of
                        one's own only the name of its class
    plan.json           what was kept of it (speedup.Plan, its index tensors beside it); only of a pruned model
    quantization.json   what is quantized, and how (quantization/deploy.py); only of a quantized model
    model.safetensors   the weights, each contiguous, tied ones under their first name; masks of activations that stayed

`load` undoes it, on any machine that has the architecture's library.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from dist_compress import models, quantization
from dist_compress.config import Config, ModelConfig
from dist_compress.errors import UserError
from dist_compress.pruning.activation_mask import restore, shipped
from dist_compress.speedup.apply import apply
from dist_compress.speedup.plan import Plan

FILE = "model.safetensors"
_FORMAT = 2  # of model.json
OWN_LOOP = "own loop"  # model.source of a model that was handed over, which only its owner can build


def export(run_dir: str | Path, model: nn.Module, plan: Plan | None, config: Config, example: Any) -> None:
    """Writes the files of `load` into `run_dir`, each of them whole or not at all. Rank 0 only.

    `model` is the model as it is now, already shrunk if there is a `plan`; `example` is (args, kwargs) of a call.
    """
    run_dir = Path(run_dir)
    own = config.model.source == OWN_LOOP
    num_classes = None if own else config.model.num_classes or _num_outputs(model, example)
    masks, tensors = shipped(model)
    quantized = quantization.describe(model)
    description = {
        "format": _FORMAT,
        "model": models.describe(config.model, model, plan.config if plan else ()),
        "num_classes": num_classes,
        "pruned": plan is not None,
        "quantized": quantized is not None,
        "channels_last": any(map(_is_channels_last, model.parameters())),
        "activation_masks": masks,
    }
    with _atomic_folder(run_dir) as folder:
        if plan is not None:
            plan.save(folder)
        if quantized is not None:
            (folder / "quantization.json").write_text(json.dumps(quantized, indent=1) + "\n", encoding="utf-8")
        save_file(_state(model) | _plain(tensors), folder / FILE, metadata={"format": "pt"})
        (folder / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path, trust: bool = False, model: nn.Module | None = None) -> nn.Module:
    """The model that `export` wrote into `folder`, in evaluation mode on the CPU. Local.

    `model`: the dense architecture, with any weights, which is made smaller in place; else the folder says how to
    build it, unless it came out of a loop of one's own.

    On the machine that wrote it, its outputs are the exported model's bit for bit. A model of the user's own
    (`model._target_`) is built by calling what the folder names, which may do anything: only with `trust`.
    Raises UserError for a folder that no run wrote, a file that is missing, or weights that do not fit.
    """
    folder = Path(folder).expanduser()
    description = _read_description(folder)
    target = description["model"].get("target")
    if model is None and description["model"].get("source") == OWN_LOOP:
        name = description["model"]["name"]
        raise UserError(
            f"load({str(folder)!r}): its {name} was trained in a loop of its owner's, so the folder cannot say how to "
            f"build it. Hand over the dense architecture: load(folder, model={name}(...))."
        )
    if target and model is None and not trust:
        raise UserError(
            f"load({str(folder)!r}): its model is made by calling {target.get('_target_')!r}, with arguments from the "
            "folder. Only if you trust whoever wrote it: load(folder, trust=True)."
        )
    own = [item["apply_method"] for item in description["activation_masks"] if "." in item["apply_method"]]
    if own and not trust:
        raise UserError(
            f"load({str(folder)!r}): masks of activations act by {own[0]!r}, code that the folder names. Only if you "
            "trust whoever wrote it: load(folder, trust=True)."
        )
    if model is None:
        model = models.build(ModelConfig(**description["model"]), description["num_classes"], seed=0)
    model = model.cpu()
    if description["pruned"]:
        apply(model, Plan.load(folder))
    restore(model, description["activation_masks"])
    if description["quantized"]:
        quantization.rebuild(model, json.loads((folder / "quantization.json").read_text(encoding="utf-8")))
    models.load_weights(model, folder / FILE, key="load")
    if description["channels_last"]:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def check(
    run_dir: str | Path, model: nn.Module, example: Any, tolerance: float = 1e-6, dense: nn.Module | None = None
) -> dict[str, float]:
    """Loads `run_dir`, compares outputs with `model` on `example`: {"max_rel_diff": max |difference| / max |output|}.
    Rank 0 only. `dense`: the architecture where the folder cannot build it; made smaller in place.

    Raises RuntimeError above `tolerance`. 0.0 is normal; some kernels of a GPU vary from call to call.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    wanted, found = _outputs(model, example), _outputs(load(run_dir, trust=True, model=dense).to(device), example)
    scales = [a.abs().max().clamp_min(torch.finfo(torch.float64).tiny) for a in wanted]
    differences = [(a - b).abs().max() / s for a, b, s in zip(wanted, found, scales, strict=True)]
    difference = torch.stack(differences).max().item()  # NaN if any is
    if not difference <= tolerance:
        raise RuntimeError(
            f"export=[safetensors]: the model loaded from {run_dir} differs from the one exported by "
            f"{difference:.3g} (relative; at most {tolerance:.0e} is allowed). Its weights or its plan are not whole."
        )
    return {"max_rel_diff": difference}


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Laid out as [N, H, W, C]. The loaded model takes the same kernels only in the same layout."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _num_outputs(model: nn.Module, example: Any) -> int:
    """The size of the last dim of the (first) output: the number of classes of a classifier."""
    return _outputs(model, example)[0].shape[-1]


def _outputs(model: nn.Module, example: Any) -> list[torch.Tensor]:
    """Floating point outputs in evaluation mode, as float64; the modes of the modules come back."""
    args, kwargs = example
    training = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (args, kwargs or {}))
    try:
        with torch.no_grad():
            for module in training:
                module.training = False
            leaves = tree_leaves(model(*args, **kwargs))
    finally:
        for module, flag in training.items():
            module.training = flag
    return [x.double() for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the model by name on the CPU, tied ones once."""
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"export=[safetensors]: {name} is a {type(tensor).__name__}. A model whose get_extra_state returns "
                "more than a tensor cannot be saved without pickle."
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return _plain(state)


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, each contiguous."""
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder beside the files of `folder`; each of its files then replaces that of `folder`."""
    scratch = Path(tempfile.mkdtemp(prefix=".export_", dir=folder))
    try:
        yield scratch
        for file in sorted(scratch.iterdir(), key=lambda f: f.name == "model.json"):  # last: it vouches for the rest
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / "model.json"
    if not folder.is_dir():
        raise UserError(f"load({str(folder)!r}): no such folder. Give the folder of a run (its run_dir).")
    if not file.is_file():
        raise UserError(
            f"load({str(folder)!r}): no model.json there, so no run exported its model to it. "
            "Give the folder of a finished run with export=[safetensors]."
        )
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        known = {
            key: description[key] for key in ("format", "model", "num_classes", "pruned", "quantized", "channels_last")
        }
        ModelConfig(**known["model"])
        known["activation_masks"] = description.get("activation_masks", [])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"load({str(folder)!r}): model.json is damaged ({error!r}). Export it again.") from error
    if known["format"] != _FORMAT:
        raise UserError(
            f"load({str(folder)!r}): model.json has format {known['format']!r}, this version reads {_FORMAT}. "
            "Use the version of dist_compress that wrote it."
        )
    return known
