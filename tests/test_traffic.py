"""What compression adds to the collectives of a step does not grow with the layers, whoever holds the parameters."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # also in the workers of the pool
from traffic import DECIDED, DENSE, PRUNED, QUANTIZED, STEADY, TAUGHT, Count, num, steps_of  # noqa: E402

ALL = ["pruning.method=taylor", *PRUNED, *QUANTIZED, *TAUGHT]
BACKENDS = {
    "fsdp": ["backend=fsdp", "backend.wrap=[Block]", "train.exact=null"],
    "zero-3": ["backend=deepspeed", "backend.stage=3", "train.exact=false"],
}
FEW, MANY = 2, 8  # blocks
MOST = 12  # collectives of a decision


def extra(run_dir: str, depth: int, each: bool, *overrides: str) -> tuple[Count, Count, Count]:
    """Of a step, beyond what the same run sent before it was masked, quantized and taught: without a decision, and with
    one; and all that was sent before. `each`: ranges of weights are reduced one by one."""
    from dist_compress.quantization import weights

    original = weights._reduced
    if each:
        weights._reduced = lambda parts, op: [t for part in parts for t in original([part], op)]
    try:
        steps = steps_of(run_dir, *ALL, f"+model.depth={depth}", *overrides)
    finally:
        weights._reduced = original
    return steps[STEADY] - steps[DENSE], steps[DECIDED] - steps[DENSE], steps[DENSE]


def bytes_of(depth: int) -> int:
    """Two numbers a row of each weight, in float32; three a quantized input, in float64."""
    rows, inputs = depth * (40 + 24) + 24 + 10, 2 * depth + 2
    return 8 * rows + 24 * inputs


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_costs_three_collectives_more_and_a_decision_a_few(ranks: Any, tmp_path: Path, name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="NOT RUN deepspeed: pip install deepspeed --no-build-isolation")
    for depth in (FEW, MANY):
        for steady, decided, dense in ranks(2, extra, str(tmp_path / str(depth)), depth, False, *BACKENDS[name]):
            assert steady == Counter(allreduce=3, bytes=bytes_of(depth)), depth
            assert num(steady) < num(decided) <= MOST + num(steady), depth
            assert num(dense) > 4 and dense["bytes"] > 10 * steady["bytes"]  # those of the backend are seen


def test_what_is_sent_layer_by_layer_is_found(ranks: Any, tmp_path: Path) -> None:
    steady, _, _ = ranks(2, extra, str(tmp_path), FEW, True, *BACKENDS["fsdp"])[0]
    assert steady["allreduce"] == 2 + 2 * FEW + 2
