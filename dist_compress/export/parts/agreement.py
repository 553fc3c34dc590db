"""How far what a format computes may be from the model of the run, on held-out samples. Everything is local.

A quantized model: a value on a tie may round to the next integer in another runtime, so the largest difference is in
units of 1 / 255 of the range of an output, and the top-1 has to agree; of a sequence for each of its tokens that the
attention mask leaves in. A float model: the difference relative to the largest output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dist_compress.export.parts.call import Call, chunks, main_output, moved, outputs
from dist_compress.quantization import deploy

NUM_CHECKED = 256  # held-out samples; of sequences, fewer: as many tokens
CHUNK = 16  # of them at a time
MAX_DIFF = 8.0  # largest difference of an output that may ship, in units of 1 / 255 of the range of that output
AGREEMENT = 0.98  # smallest share of samples, or tokens, with the same top-1 that may ship
FLOAT_DIFF = 1e-3  # of a float model, relative

Run = Callable[[Call], Mapping[str, torch.Tensor]]


def check(run: Run, model: nn.Module, example: Any, key: str, where: Any) -> dict[str, float]:
    """`run`, what was exported, against `model`.

    {"max_rel_diff"} of a float model; of a quantized one {"max_diff": in units, "top1_agreement": share}. Raises
    RuntimeError, which begins with `key`, where they differ too much.
    """
    seen: dict[str, _Seen] = {}
    same = count = 0
    for call in chunks(moved(example, "cpu"), CHUNK):
        wanted, found = outputs(model, call), run(call)
        for name, tensor in found.items():
            seen.setdefault(name, _Seen()).add(wanted[name].double(), tensor.double())
        main = main_output(found)
        agree = _top1(wanted[main]) == _top1(found[main])
        agree = agree[_counted(call, agree.shape)]
        same, count = same + int(agree.sum()), count + agree.numel()
        if count >= NUM_CHECKED:
            break
    if not deploy.quantizers(model):
        relative = max(s.worst / max(s.largest, 1e-30) for s in seen.values())
        refuse(relative <= FLOAT_DIFF, key, where, f"differs by {relative:.3g} (relative; at most {FLOAT_DIFF:g})")
        return {"max_rel_diff": relative}
    units = max(255 * s.worst / max(s.high - s.low, 1e-30) for s in seen.values())
    share = same / max(count, 1)
    refuse(units <= MAX_DIFF, key, where, f"differs by {units:.3g} units (at most {MAX_DIFF:g})")
    refuse(share >= AGREEMENT, key, where, f"agrees in {share:.1%} of {count} top-1 (at least {AGREEMENT:.0%})")
    return {"max_diff": units, "top1_agreement": share}


def refuse(good: bool, key: str, where: Any, what: str) -> None:
    if not good:
        raise RuntimeError(f"{key}: the output of {where} {what}. It must not ship.")


class _Seen:
    """Of one output: its range, its largest magnitude, the largest difference (NaN if any is)."""

    def __init__(self) -> None:
        self.low, self.high, self.largest, self.worst = float("inf"), float("-inf"), 0.0, 0.0

    def add(self, wanted: torch.Tensor, found: torch.Tensor) -> None:
        self.low, self.high = min(self.low, float(wanted.min())), max(self.high, float(wanted.max()))
        self.largest = max(self.largest, float(wanted.abs().max()))
        worst = float((wanted - found).abs().max())
        self.worst = worst if worst != worst or worst > self.worst else self.worst


def _top1(logits: torch.Tensor) -> torch.Tensor:
    """Classes are the last dim of [n, classes] and [n, tokens, classes], the second of images [n, classes, h, w]."""
    return logits.argmax(1 if logits.dim() > 3 else -1)


def _counted(call: Call, shape: torch.Size) -> torch.Tensor:
    mask = call[1].get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == shape else torch.ones(shape).bool()
