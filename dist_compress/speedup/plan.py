"""The plan of a shrink: what to keep of each tensor, per dim, and the integers and biases that change with it.

It is the artefact: made on rank 0, broadcast, applied to models, optimizer state and checkpoints alike, saved as
plan.json (for people too) and plan.safetensors (the indices).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dist_compress.errors import UserError


@dataclass(frozen=True)
class Blocked:
    """Slices that are all zero but had to stay."""

    fqn: str
    dim: int
    count: int
    reason: str


@dataclass
class Plan:
    """Identical on every rank once broadcast. An empty plan changes nothing."""

    keep: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)  # tensor fqn -> dim -> int64 [kept]
    attrs: dict[str, int] = field(default_factory=dict)  # "fqn.attr" -> new value
    bias: dict[str, torch.Tensor] = field(default_factory=dict)  # fqn -> new value, already sliced
    blocked: list[Blocked] = field(default_factory=list)

    def fingerprint(self) -> int:
        """63 bits of what `apply` would do; independent of world size and dict order."""
        digest = hashlib.sha256()
        for fqn in sorted(self.keep):
            for dim in sorted(self.keep[fqn]):
                digest.update(f"{fqn}/{dim}:{self.keep[fqn][dim].tolist()}".encode())
        digest.update(json.dumps(self.attrs, sort_keys=True).encode())
        for fqn in sorted(self.bias):
            digest.update(f"{fqn}:{self.bias[fqn].double().tolist()}".encode())
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    def save(self, folder: str | Path) -> None:
        """Write plan.json and plan.safetensors. Rank 0 only."""
        folder = Path(folder)
        tensors = {f"keep/{fqn}/{dim}": index for fqn, dims in self.keep.items() for dim, index in dims.items()}
        tensors |= {f"bias/{fqn}": value for fqn, value in self.bias.items()}
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "plan.safetensors")
        content = {
            "version": 1,
            "fingerprint": self.fingerprint(),
            "kept": {f: {str(d): len(i) for d, i in dims.items()} for f, dims in self.keep.items()},
            "attrs": self.attrs,
            "bias": list(self.bias),
            "blocked": [asdict(item) for item in self.blocked],
        }
        (folder / "plan.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read what `save` wrote. Raises UserError naming the file when it is missing or damaged."""
        folder = Path(folder)
        try:
            content = json.loads((folder / "plan.json").read_text())
            tensors = load_file(folder / "plan.safetensors")
            keep = {
                fqn: {int(dim): tensors[f"keep/{fqn}/{dim}"] for dim in dims} for fqn, dims in content["kept"].items()
            }
            bias = {fqn: tensors[f"bias/{fqn}"] for fqn in content["bias"]}
            plan = cls(keep, content["attrs"], bias, [Blocked(**item) for item in content["blocked"]])
        except Exception as error:
            raise UserError(
                f"{folder}: cannot read plan.json and plan.safetensors ({type(error).__name__}: {error}). "
                "Both are written by a run with speedup; copy the folder whole."
            ) from error
        if plan.fingerprint() != content["fingerprint"]:
            raise UserError(f"{folder}: plan.safetensors does not belong to plan.json (fingerprints differ).")
        return plan
