"""A run on sharded parameters is the run on one rank: decisions, plan and weights, bit for bit, and across a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from whole_runs import killed_at

QUICK = [
    "+recipe=smoke",
    "train.exact=true",
    "train.channels_last=false",  # FSDP2 keeps its weights in rows, so other kernels would be used
    "train.clip_norm=1.0",
    "data.image_size=8",
    "train.max_steps=10",
    "train.eval_batch_size=180",
    "pruning.method=taylor",
    "pruning.schedule={name: linear, start: 2steps, end: 6steps, num_decisions: 2}",
    "optim=adamw",
    "optim.lr=0.003",
    "checkpoint.every_steps=null",
]


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    from dist_compress import compose, outcome, run

    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir(exist_ok=True)
    run.run(compose.compose(compose.parse([*QUICK, *overrides, f"run_dir={run_dir}"])))
    facts = json.loads((Path(run_dir) / "facts.json").read_text())
    return {
        **json.loads((Path(run_dir) / "summary.json").read_text()),
        "decisions": facts["methods"]["decisions"],
        "kept": facts["methods"]["kept_channels"],
    }


def bits(summary: dict[str, Any]) -> dict[str, Any]:
    names = (
        "decisions", "kept", "fingerprint/plan", "fingerprint/weights", "loss/before", "loss/masked", "loss/shrunk",
        "loss/after", "macs/after", "verify/max_rel_diff",
    )  # fmt: skip
    return {name: summary[name] for name in names}


@pytest.fixture(scope="module")
def one_rank(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, whole_run, str(tmp_path_factory.mktemp("one")))[0]


def test_fsdp_has_the_bits_of_one_rank(ranks: Any, tmp_path: Path, one_rank: dict[str, Any]) -> None:
    """On three ranks, of which some parameters give nothing to the last; on two and four below."""
    found = ranks(3, whole_run, str(tmp_path), "backend=fsdp", "backend.min_params=10000")[0]
    assert found["macs/after"] < 0.6 * found["macs/before"] and found["verify/max_rel_diff"] <= 1e-5
    assert bits(found) == bits(one_rank)


def killed_run(run_dir: str, step: int, *overrides: str) -> None:
    with killed_at(step):
        whole_run(run_dir, "checkpoint.every_steps=1", *overrides)


@pytest.mark.parametrize(
    ("step", "size", "first", "then", "second"),
    [(5, 2, "ddp", 3, "fsdp"), (8, 4, "fsdp", 2, "fsdp")],
)
def test_killed_and_resumed_on_other_ranks_and_another_backend(
    ranks: Any, tmp_path: Path, one_rank: dict[str, Any], step: int, size: int, first: str, then: int, second: str
) -> None:
    """Dense; between the decisions; masked; small."""
    ranks(size, killed_run, str(tmp_path), step, f"backend={first}")
    assert not (tmp_path / "summary.json").exists()
    found = ranks(then, whole_run, str(tmp_path), "checkpoint.every_steps=1", f"backend={second}")[0]
    assert bits(found) == bits(one_rank)


def differently(run_dir: str, how: str) -> str:
    """What becomes of a sharded run that goes wrong in one place on rank 1."""
    from dist_compress import comm
    from dist_compress.run import Job

    original, wrong = Job.planned, Job.source

    def other(self: Any, zeros: Any) -> Any:
        plan = original(self, zeros)
        keep = plan.keep["layer3.0.conv2.weight"]
        keep[1] = keep[1].flip(0)  # its inputs, in another order than that of the channels it reads
        return plan

    def moved(self: Any, plan: Any, weights: Any) -> Any:
        right = wrong(self, plan, weights)
        return lambda name: right(name) * (1 + 0.01 * (comm.rank() == 1))

    setattr(Job, *(("planned", other) if how == "slices do not fit" else ("source", moved)))
    try:
        whole_run(run_dir, "backend=fsdp", "export=[]")
    except RuntimeError as error:
        return str(error)
    finally:
        Job.planned, Job.source = original, wrong
    return ""


@pytest.mark.parametrize("how", ["slices do not fit", "a rank slices something else"])
def test_negative_controls(ranks: Any, tmp_path: Path, how: str) -> None:
    for said in ranks(2, differently, str(tmp_path), how):
        assert said.startswith("masked and shrunk model differ by")
