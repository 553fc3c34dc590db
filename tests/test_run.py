"""Whole runs on 1 to 4 ranks: the same decisions and the same weights, also when killed on the way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import killed_at, killed_in

STEPS = 14
QUICK = [
    "+recipe=smoke",
    "logger=none",
    "data.image_size=12",
    f"train.max_steps={STEPS}",
    "train.log_every_steps=1",
    "train.eval_batch_size=90",
    "pruning.schedule.start=4steps",
    "pruning.schedule.end=10steps",
    "pruning.schedule.num_decisions=4",
    "checkpoint.every_steps=null",
]


def job(run_dir: str, *overrides: str) -> Any:
    from dist_compress import compose, run

    return run.Job(compose.compose(compose.parse([*QUICK, *overrides, f"run_dir={run_dir}"])))


def whole_run(run_dir: str, *overrides: str) -> dict[str, Any]:
    """The summary of an undisturbed run, with all decisions."""
    from dist_compress import compose, outcome, run

    outcome.LATENCY_S = 0.1  # no test here looks at it
    Path(run_dir).mkdir(exist_ok=True)
    run.run(compose.compose(compose.parse([*QUICK, *overrides, f"run_dir={run_dir}"])))
    return read_summary(run_dir)


def read_summary(run_dir: str) -> dict[str, Any]:
    facts = json.loads((Path(run_dir) / "facts.json").read_text())
    more = {"decisions": facts["methods"]["decisions"], "num_kept": len(facts["kept"])}
    return {**json.loads((Path(run_dir) / "summary.json").read_text()), **more}


def killed_run(run_dir: str, step: int, *overrides: str) -> None:
    """Its checkpoints are all that stays."""
    Path(run_dir).mkdir(exist_ok=True)
    with killed_at(step):
        whole_run(run_dir, *overrides)


def fingerprints(summary: dict[str, Any]) -> dict[str, Any]:
    names = ("decisions", "fingerprint/weights", "fingerprint/plan", "accuracy/before", "loss/masked", "loss/after")
    return {name: summary[name] for name in names}


@pytest.fixture(scope="module")
def one_rank(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Undisturbed runs on one rank, by metric."""
    folder = tmp_path_factory.mktemp("one")
    return {
        method: ranks(1, whole_run, str(folder / method), f"pruning.method={method}")[0]
        for method in ("taylor", "l1_norm", "l2_norm")
    }


def test_a_run_delivers_a_smaller_verified_model(one_rank: dict[str, dict[str, Any]]) -> None:
    for summary in one_rank.values():
        assert len(summary["decisions"]) == 4
        assert len({d["fingerprint"] for d in summary["decisions"]}) == 4
        assert summary["macs/after"] < 0.45 * summary["macs/before"]
        assert summary["verify/max_rel_diff"] <= 1e-5
        assert summary["accuracy/masked"] == summary["accuracy/shrunk"]


@pytest.mark.parametrize(
    ("method", "size"), [("taylor", 3), ("taylor", 4), ("l1_norm", 2), ("l2_norm", 3)]
)
def test_equal_bits_at_any_number_of_ranks(
    ranks: Any, tmp_path: Path, one_rank: dict[str, dict[str, Any]], method: str, size: int
) -> None:
    summary = ranks(size, whole_run, str(tmp_path / "run"), f"pruning.method={method}")[0]
    assert summary["world_size"] == size
    assert fingerprints(summary) == fingerprints(one_rank[method])


def run_without_reduction(run_dir: str) -> str:
    """What becomes of a run whose gradients are not summed over the ranks."""
    from dist_compress import comm

    add, total = comm.OrderedSum.add, comm.OrderedSum.total

    def add_own(self: Any, rows: torch.Tensor, num_rows: int) -> None:
        self.own = getattr(self, "own", 0) + rows.double().sum(0)

    comm.OrderedSum.add, comm.OrderedSum.total = add_own, lambda self: self.own
    try:
        whole_run(run_dir)
    except RuntimeError as error:
        return str(error)
    finally:
        comm.OrderedSum.add, comm.OrderedSum.total = add, total
    return ""


def test_negative_control_without_the_reduction_ranks_are_caught(ranks: Any, tmp_path: Path) -> None:
    """Scores have one owner, so masks agree even then; the weights do not, and the tensor is named."""
    for text in ranks(2, run_without_reduction, str(tmp_path / "run")):
        assert "conv1.weight" in text and "step 4" in text, text


@pytest.mark.parametrize(
    ("step", "size", "then"),
    [(3, 2, 1), (7, 3, 4), (12, 2, 3)],  # dense; between decisions; after the shrink
)
def test_a_killed_run_resumes_to_the_same_bits(
    ranks: Any, tmp_path: Path, one_rank: dict[str, dict[str, Any]], step: int, size: int, then: int
) -> None:
    run_dir, often = str(tmp_path / "run"), "checkpoint.every_steps=2"
    ranks(size, killed_run, run_dir, step, often)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    summary = ranks(then, whole_run, run_dir, often)[0]
    assert fingerprints(summary) == fingerprints(one_rank["taylor"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def killed_before_the_small_checkpoint(run_dir: str) -> int:
    """How much a run notes as kept, all told, that died once between its shrink and the checkpoint of it."""
    from dist_compress import run
    from dist_compress.training.loop import Trainer

    with killed_in(Trainer, "save", lambda trainer: trainer.phase == run.SMALL):
        whole_run(run_dir, "checkpoint.every_steps=5", "export=[]")
    assert (Path(run_dir) / "config.yaml").is_file(), "a run says what it is from its start"
    whole_run(run_dir, "checkpoint.every_steps=5", "export=[]", "speedup.tolerance=1e-4")
    return len(json.loads((Path(run_dir) / "facts.json").read_text())["kept"])


def test_what_is_kept_is_told_once(ranks: Any, tmp_path: Path, one_rank: dict[str, dict[str, Any]]) -> None:
    kept = ranks(1, killed_before_the_small_checkpoint, str(tmp_path / "run"))[0]
    assert kept == one_rank["taylor"]["num_kept"] > 0
    summary = read_summary(str(tmp_path / "run"))
    assert fingerprints(summary) == fingerprints(one_rank["taylor"])


def with_settings(run_dir: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    from dist_compress import run

    difference = run.difference
    run.difference = lambda masked, shrunk: 0.5  # reported, and no reason to stop: norm=plain asks for it
    try:
        own = ["train.max_steps=10", "pruning.schedule.end=6steps", "pruning.sparse_ratio=0.3"]
        own += ["speedup.norm=plain", "speedup.round_to=4", "speedup.barrier=[layer1]", "speedup.keep=['layer3.0.*']"]
        summary = whole_run(run_dir, *own)
    finally:
        run.difference = difference
    page = (Path(run_dir) / "report.html").read_text()
    return summary, json.loads((Path(run_dir) / "plan.json").read_text())["kept"], page


def test_the_settings_of_the_speedup_hold(ranks: Any, tmp_path: Path) -> None:
    summary, kept, page = ranks(1, with_settings, str(tmp_path / "run"))[0]
    assert "coupling groups" in page and page.count("units, ") > 3
    assert summary["verify/max_rel_diff"] == 0.5 and summary["params/after"] < summary["params/before"]
    assert kept and all(n % 4 == 0 for dims in kept.values() for n in dims.values())
    assert not [name for name in kept if name.startswith(("layer1.", "layer3.0."))]
    assert "as speedup.norm=plain asks" in page and "is not the masked model" not in page


def shrink_at(run_dir: str, at: str) -> str:
    from dist_compress.errors import UserError

    Path(run_dir).mkdir()
    own = job(run_dir, f"speedup.at={at}")
    own.reporter.close(finished=False)
    try:
        return str(own.change_window())
    except UserError as error:
        return str(error)


def test_the_shrink_lies_between_the_last_decision_and_the_end(ranks: Any, tmp_path: Path) -> None:
    assert ranks(1, shrink_at, str(tmp_path / "a"), "12steps")[0] == "(4, 12)"
    assert "before the last pruning decision" in ranks(1, shrink_at, str(tmp_path / "b"), "9steps")[0]
    assert f"the run has {STEPS}" in ranks(1, shrink_at, str(tmp_path / "c"), "15steps")[0]


def trained_on(run_dir: str, control: str) -> float:
    """Largest relative difference of weights trained on after the shrink from those trained on masked."""
    from dist_compress.speedup import apply_to_state

    models, plan = [], None
    for name, shrink in (("masked", "false"), ("shrunk", "true")):
        folder = Path(run_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        own = job(str(folder), f"speedup.enabled={shrink}")
        rebuild = own.trainer.rebuild
        if control == "moments dropped" and shrink == "true":
            own.trainer.rebuild = lambda transform, source, rebuild=rebuild: rebuild(lambda moments: {})
        if control == "moments not sliced" and shrink == "true":
            own.trainer.rebuild = lambda transform, source, rebuild=rebuild: rebuild(lambda moments: moments)
        own.train()
        own.reporter.close(finished=False)
        models.append({n: p.detach() for n, p in own.model.named_parameters()})
        plan = own.plan
    masked, shrunk = apply_to_state(plan, models[0]), models[1]
    return max(float((masked[n] - w).abs().max() / w.abs().max()) for n, w in shrunk.items())


def test_training_on_small_is_training_on_masked(ranks: Any, tmp_path: Path) -> None:
    """The optimizer's moments, sliced, make the small model's further steps those of the masked one."""
    assert ranks(2, trained_on, str(tmp_path / "a"), "")[0] < 1e-3


def test_negative_control_moments(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, trained_on, str(tmp_path / "a"), "moments dropped")[0] > 1e-2
    with pytest.raises(AssertionError, match="shape|size"):
        ranks(2, trained_on, str(tmp_path / "b"), "moments not sliced")


def test_load_gives_the_delivered_model(ranks: Any, tmp_path: Path) -> None:
    from dist_compress import load
    from dist_compress.fingerprint import weights_fingerprint

    summary = ranks(2, whole_run, str(tmp_path / "run"))[0]
    model = load(tmp_path / "run")
    assert weights_fingerprint(model) == summary["fingerprint/weights"]
    assert sum(p.numel() for p in model.parameters()) == summary["params/after"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


SEARCH = ("pruning.method=l1_norm", "pruning.search.evaluations=6", "pruning.search.samples=70")
SPARSE = (
    "pruning.config_list=[{op_names_re: ['layer1.*conv'], method: rigl, options: {every: 2, until: 1.0}},"
    "{op_names_re: ['layer2.*conv'], method: sr_ste}]",
    "speedup.enabled=false",
)


def killed_while_it_searches(run_dir: str, *overrides: str) -> None:
    """A run that ends in the middle of its fourth measurement."""
    from dist_compress import run

    count = itertools.count(1)
    with killed_in(run.Job, "measure", lambda job: next(count) == 4):
        whole_run(run_dir, *overrides)


def found(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "facts.json").read_text())["methods"]["search"]


def test_a_search_finds_the_same_on_any_number_of_ranks_also_when_killed(ranks: Any, tmp_path: Path) -> None:
    one, other, often = tmp_path / "one", tmp_path / "other", "checkpoint.every_steps=3"
    summary = ranks(1, whole_run, str(one), *SEARCH)[0]
    ranks(2, killed_while_it_searches, str(other), often, *SEARCH)
    assert not (other / "summary.json").exists() and any((other / "checkpoints").iterdir())
    again = ranks(3, whole_run, str(other), often, *SEARCH)[0]
    assert fingerprints(again) == fingerprints(summary)
    assert found(other) == found(one) and len(found(one)["history"]) == 6
    assert len(set(found(one)["ratios"].values())) > 1  # not the uniform ratio


def test_sparse_training_has_equal_bits_on_any_number_of_ranks_also_when_killed(ranks: Any, tmp_path: Path) -> None:
    one, other, often = tmp_path / "one", tmp_path / "other", "checkpoint.every_steps=2"
    summary = ranks(1, whole_run, str(one), *SPARSE)[0]
    assert [d["step"] for d in summary["decisions"]] == [4, 6, 8, 10, STEPS]
    ranks(2, killed_run, str(other), 9, often, *SPARSE)
    again = ranks(3, whole_run, str(other), often, *SPARSE)[0]
    assert "fingerprint/plan" not in summary  # nothing is shrunk
    for name in ("decisions", "fingerprint/weights", "accuracy/before", "loss/masked", "loss/after"):
        assert again[name] == summary[name], name
