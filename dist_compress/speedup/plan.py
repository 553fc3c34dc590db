"""The plan of a shrink: what to keep of each tensor, per dim, and all else that changes with it.

It is the artefact: made on rank 0, broadcast, applied to models, optimizer state and checkpoints alike, saved as
plan.json (for people too) and plan.safetensors (the indices).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dist_compress.errors import UserError

_VERSION = 2
_PLAIN = (type(None), bool, int, float, str)  # what JSON gives back as it was


@dataclass(frozen=True)
class Blocked:
    """Slices that are all zero but had to stay."""

    fqn: str
    dim: int
    count: int
    reason: str


@dataclass(frozen=True)
class Swap:
    """A module that is exchanged for one of another class: `name` as `speedup.modules` registers it."""

    name: str
    settings: dict[str, int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphRewrite:
    """A module whose python code cannot run at the new sizes, as its recorded graph with other numbers in it.

    `apply` records the module anew on `inputs` (args, kwargs), before anything is sliced, and changes the numbers.
    """

    inputs: tuple[tuple[Any, ...], dict[str, Any]]  # nests of tensors and plain values
    structure: str  # hash of the recorded nodes: apply refuses another graph
    # node name -> argument path ("1.2" is args[1][2]) -> new value
    rewrites: dict[str, dict[str, int | float | str | list[int]]]
    calls: tuple[str, ...] = ()  # fqns of modules inside that are recorded as one call, with their own code


@dataclass
class Plan:
    """Identical on every rank once broadcast. An empty plan changes nothing."""

    keep: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)  # tensor fqn -> dim -> int64 [kept]
    attrs: dict[str, int] = field(default_factory=dict)  # "fqn.attr" -> new value
    # biases and gains of weight norms: fqn -> new value, already sliced
    bias: dict[str, torch.Tensor] = field(default_factory=dict)
    blocked: list[Blocked] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of each tensor in `keep`, before
    swaps: dict[str, Swap] = field(default_factory=dict)  # module fqn -> its replacement
    # modules with a user's `resize`: fqn -> "input0" | "output0" | parameter name -> dim -> int64 [kept]
    resized: dict[str, dict[str, dict[int, torch.Tensor]]] = field(default_factory=dict)
    graphs: dict[str, GraphRewrite] = field(default_factory=dict)  # module fqn -> what its graph becomes
    config: dict[str, int] = field(default_factory=dict)  # field of model.config -> new value

    def fingerprint(self) -> int:
        """63 bits of what `apply` would do; independent of world size and dict order."""
        digest = hashlib.sha256()
        for name, index in sorted(_indices(self).items()):
            digest.update(f"{name}:{index.tolist()}".encode())
        digest.update(json.dumps(_plain_part(self), sort_keys=True).encode())
        for fqn in sorted(self.bias):
            digest.update(f"{fqn}:{self.bias[fqn].double().tolist()}".encode())
        for fqn in sorted(self.graphs):
            graph = self.graphs[fqn]
            changes = json.dumps(graph.rewrites, sort_keys=True)
            digest.update(f"{fqn}:{graph.structure}:{graph.calls}:{changes}".encode())
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    def without(self, names: list[str]) -> Plan:
        """For a model that does not have these tensors. Raises UserError when a recorded graph reads one of them."""
        for fqn, graph in self.graphs.items():
            own = tuple(f"{call}." for call in graph.calls)  # run their own code
            inside = [name for name in names if name.startswith(f"{fqn}.") and not name.startswith(own)]
            if inside:
                raise UserError(
                    f"{inside[0]} acts inside of {fqn}, whose code runs as a recorded graph at the new sizes. Leave "
                    f"that target out of the config list, or keep {fqn} whole (speedup.barrier)."
                )
        keep = {fqn: dims for fqn, dims in self.keep.items() if fqn not in names}
        return replace(self, keep=keep, shapes={fqn: shape for fqn, shape in self.shapes.items() if fqn in keep})

    def save(self, folder: str | Path) -> None:
        """Write plan.json and plan.safetensors. Rank 0 only."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = _indices(self) | {f"bias/{fqn}": value for fqn, value in self.bias.items()}
        graphs = {
            fqn: {
                "inputs": encode(graph.inputs, f"graphs/{fqn}", tensors),
                "structure": graph.structure,
                "calls": list(graph.calls),
                "rewrites": graph.rewrites,
            }
            for fqn, graph in self.graphs.items()
        }
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "plan.safetensors")
        content = {
            "version": _VERSION,
            "fingerprint": self.fingerprint(),
            "kept": {fqn: _counts(dims) for fqn, dims in self.keep.items()},
            **_plain_part(self),
            "bias": list(self.bias),
            "resized": {fqn: {n: _counts(dims) for n, dims in of.items()} for fqn, of in self.resized.items()},
            "graphs": graphs,
            "blocked": [asdict(item) for item in self.blocked],
        }
        (folder / "plan.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read what `save` wrote. Raises UserError naming the file when it is missing or damaged."""
        folder = Path(folder)
        try:
            content = json.loads((folder / "plan.json").read_text())
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']}, this dist_compress reads {_VERSION}")
            plan = _decode_plan(content, load_file(folder / "plan.safetensors"))
        except Exception as error:
            raise UserError(
                f"{folder}: cannot read plan.json and plan.safetensors ({type(error).__name__}: {error}). "
                "Both are written by a run with speedup; copy the folder whole."
            ) from error
        if plan.fingerprint() != content["fingerprint"]:
            raise UserError(f"{folder}: plan.safetensors does not belong to plan.json (fingerprints differ).")
        return plan


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; its tensors go to `tensors` under names that begin with `name`.

    Raises TypeError for anything but tensors, plain values, lists, tuples and dicts with string keys.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: encode(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    raise TypeError(f"{type(value).__name__} cannot be stored without pickle")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {key: _decode(item, tensors) for key, item in content.items()}


def _decode_plan(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Plan:
    def indices(prefix: str, counts: dict[str, int]) -> dict[int, torch.Tensor]:
        return {int(dim): tensors[f"{prefix}/{dim}"] for dim in counts}

    return Plan(
        keep={fqn: indices(f"keep/{fqn}", dims) for fqn, dims in content["kept"].items()},
        attrs=content["attrs"],
        bias={fqn: tensors[f"bias/{fqn}"] for fqn in content["bias"]},
        blocked=[Blocked(**item) for item in content["blocked"]],
        shapes={fqn: tuple(shape) for fqn, shape in content["shapes"].items()},
        swaps={fqn: Swap(**swap) for fqn, swap in content["swaps"].items()},
        resized={
            fqn: {name: indices(f"resized/{fqn}/{name}", dims) for name, dims in of.items()}
            for fqn, of in content["resized"].items()
        },
        graphs={
            fqn: GraphRewrite(
                _decode(graph["inputs"], tensors), graph["structure"], graph["rewrites"], tuple(graph["calls"])
            )
            for fqn, graph in content["graphs"].items()
        },
        config=content["config"],
    )


def _indices(plan: Plan) -> dict[str, torch.Tensor]:
    """Every index tensor, by the name it has in plan.safetensors."""
    found = {f"keep/{fqn}/{dim}": index for fqn, dims in plan.keep.items() for dim, index in dims.items()}
    for fqn, of in plan.resized.items():
        for name, dims in of.items():
            found |= {f"resized/{fqn}/{name}/{dim}": index for dim, index in dims.items()}
    return found


def _plain_part(plan: Plan) -> dict[str, Any]:
    """The fields that JSON holds as they are."""
    return {
        "attrs": plan.attrs,
        "shapes": {fqn: list(shape) for fqn, shape in plan.shapes.items()},
        "swaps": {fqn: asdict(swap) for fqn, swap in plan.swaps.items()},
        "config": plan.config,
    }


def _counts(dims: dict[int, torch.Tensor]) -> dict[str, int]:
    return {str(dim): len(index) for dim, index in dims.items()}
