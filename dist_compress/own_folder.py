"""What a loop of one's own leaves in a folder: the summary, the report and the export of a run, by the same code.

Only what took part is told: the sections `model`, `pruning` and `speedup` of the configuration. Curves of the training
are the loop's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dist_compress import comm
from dist_compress.config import Config, LoggerConfig, ModelConfig, to_yaml
from dist_compress.export import safetensors
from dist_compress.method import Method
from dist_compress.outcome import Outcome
from dist_compress.reporting.reporter import Reporter
from dist_compress.speedup import Plan
from dist_compress.speedup.masking import duplicate
from dist_compress.target import Coupling

SECTIONS = ("model", "pruning", "speedup")


class OwnFolder:
    """The results of one attached model in `run_dir`. Called alike on every rank; rank 0 acts."""

    def __init__(self, config: Config, run_dir: Path, model: nn.Module, example: Any, total_steps: int) -> None:
        self.run_dir, self.example, self.total_steps = run_dir, example, total_steps
        self.config = dataclasses.replace(
            config,
            run_dir=str(run_dir),
            model=ModelConfig(source=safetensors.OWN_LOOP, name=type(model).__name__),
            backend=dataclasses.replace(config.backend, name=safetensors.OWN_LOOP),
            logger=LoggerConfig(name="none"),
        )
        self.outcome = Outcome(self.config, run_dir, example, resumed=False, sections=SECTIONS)
        self.outcome.dense(model, example)
        self.told: list[tuple[int, str]] = []  # (optimizer steps done, a line)
        self.dense: nn.Module | None = None
        self.plan: Plan | None = None

    def attached(self, coupling: Coupling, model: nn.Module, notes: Sequence[str]) -> None:
        self.outcome.coupled(coupling, model)
        self.told += [(0, line) for line in notes]
        told = to_yaml(self.config, SECTIONS)
        comm.on_rank0(lambda: (self.run_dir / "config.yaml").write_text(told, encoding="utf-8"))

    def before(self, metrics: dict[str, float], step: int) -> None:
        """The dense model at the boundary of the first change."""
        self.outcome.before(metrics)
        self._line("before", step)

    def keep(self, masked: nn.Module) -> None:
        """The model in its dense shape, held from here on by rank 0."""
        if comm.rank() == 0:
            self.dense = masked

    def compressed(self, methods: Sequence[Method], metrics: dict[str, float], step: int) -> None:
        """The simulated model after the last decision. Collective."""
        self.outcome.compressed(methods, metrics)
        self._line("masked", step)

    def shrunk(self, plan: Plan, difference: float, metrics: dict[str, float], step: int) -> None:
        self.plan = plan
        self.outcome.verified(difference, plan)
        self.outcome.became("shrunk", metrics)
        self._line("shrunk", step)

    def deliver(self, model: nn.Module, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Export `model` as it is now, check the export, write summary.json and report.html. Collective."""
        self.outcome.after(model, dict(after))

        def ship() -> None:
            assert self.dense is not None
            self.outcome.summary.update({f"{name}/before": value for name, value in before.items()})
            safetensors.export(self.run_dir, model, self.plan, self.config, self.example)
            checked = safetensors.check(self.run_dir, model, self.example, dense=duplicate(self.dense))
            self.outcome.exported("safetensors", checked)
            self.outcome.latencies(self.dense, model)
            reporter = Reporter(self.config, self.run_dir, self.total_steps)
            for step, line in self.told:
                reporter.event(line, step)
            reporter.summary(self.outcome.finish({}), self.outcome.shown())
            reporter.close()

        comm.on_rank0(ship)

    def state(self) -> str:
        """What was found out so far, the same on every rank. Collective."""
        return comm.broadcast_object(json.dumps({"facts": self.outcome.facts, "told": self.told}, default=str))

    def load(self, state: str) -> None:
        found = json.loads(state)
        self.outcome.facts, self.told = found["facts"], [(step, line) for step, line in found["told"]]

    def _line(self, when: str, step: int) -> None:
        if comm.rank() == 0:
            self.told.append((step, self.outcome.line(when)))
