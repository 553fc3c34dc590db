"""The story of a run, in order. Every function here is collective: every rank calls it.

    build -> trace, couple, attach -> train; at step boundaries: decisions; measure before the first change;
    methods start (calibrate, quantize); after the last decision plan on rank 0, apply everywhere, verify
    -> finish (fold), evaluate -> export, check, report

A run that was stopped goes on from the newest checkpoint of its folder, in the phase the checkpoint was written in;
one that had finished has a checkpoint of its last step, and only delivers again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from dist_compress import backends, comm, cost_file, distillation, export, pruning, quantization, speedup
from dist_compress.answers import answers, difference, probes
from dist_compress.building import Builder
from dist_compress.config import Config, to_yaml
from dist_compress.duration import duration
from dist_compress.errors import UserError
from dist_compress.fingerprint import fingerprint_of, tensor_fingerprints
from dist_compress.layout import Layout
from dist_compress.method import Context, Method
from dist_compress.outcome import Outcome
from dist_compress.parts import Parts, check_copies, gather_to_rank0
from dist_compress.projection import Projection
from dist_compress.reporting.reporter import Reporter
from dist_compress.slices import slice_masks
from dist_compress.speedup import Plan, apply, apply_to_state
from dist_compress.target import Coupling
from dist_compress.tracing.copies import on_meta
from dist_compress.tracing.weightless import weightless
from dist_compress.training import checkpoint, data, determinism, task
from dist_compress.training.calibration import calibrate
from dist_compress.training.data.split import Sample
from dist_compress.training.loop import Trainer
from dist_compress.training.schedule import run_length

CHANGING = "compress"  # the phase of a checkpoint written after the dense model was measured
SMALL = "fine-tune"  # ... after the shrink
CHECKED = 64  # held-out samples on which what is delivered is compared
Known = tuple[dict[str, float], dict[str, float]]  # metrics of a model, and what there is to say of its teacher store
SHRUNK_BY = Path("checkpoints", "plan")  # of a resumed run: with what the methods have added to the model


def run(config: Config) -> None:
    """Do what `config` says, in the folder `config.run_dir`. Collective.

    Raises UserError for what the user can mend and RuntimeError when a promise is broken: masked and shrunk differ,
    ranks disagree, an export does not load.
    """
    job = Job(config)
    try:
        job.train()
        job.deliver()
    except BaseException:
        job.reporter.close(finished=False)
        raise


class Job:
    """What the phases of a run hand on to each other. Built alike on every rank."""

    def __init__(self, config: Config) -> None:
        assert config.run_dir is not None
        self.config, self.run_dir = config, Path(config.run_dir)
        for name in config.export:
            export.find(name)
        config, self.backend = backends.build(config)
        self.config = config
        comm.on_rank0(lambda: _refuse_other_results(self.run_dir, config))
        determinism.set_up(config.train)  # before the first kernel runs: cuBLAS asks once
        self.augmentation, views = distillation.stored_views(config) or (config.seed, None)
        self.data = data.build(config.data, self.augmentation, views)
        self.task = task.build(config.task)
        self.builder = Builder(config, self.data)
        self.example = self.data.example(2)
        self.initial = self.builder.initial(self.backend.sharded, self.example)
        self.model = self.initial.model
        self.length = run_length(config, self.data.train.num_samples)
        self.projection = Projection(self.model)
        distiller = distillation.build(config, self.data.train, self.builder.teacher)
        self.methods = [*pruning.build(config), *distiller, *quantization.build(config)]
        self.plan: Plan | None = None  # as others apply it
        self.coupling = Coupling()
        newest = checkpoint.latest(self.run_dir)
        if newest is None:
            self.check_exports()
        phase = checkpoint.read_meta(newest)["phase"] if newest else ""
        self.outcome = Outcome(config, self.run_dir, self.example, resumed=newest is not None)
        self.initial.on_rank0(self.outcome.dense)
        self.attach()
        if phase == SMALL:
            plan = comm.on_rank0(lambda: Plan.load(self.run_dir / SHRUNK_BY)) if config.speedup.enabled else None
            with weightless(self.model, comm.device()):
                self.detach()
                self.cut(plan)
        self.reporter = Reporter(config, self.run_dir, self.length.total_steps, resumed=newest is not None)
        self.outcome.coupled(self.coupling, self.model)
        self.trainer = Trainer(
            config, self.model, self.data, self.task, self.methods, self.backend, self.projection, self.reporter,
            self.initial.source(needed=newest is None),
        )  # fmt: skip
        if phase == SMALL:
            for method in self.methods:
                method.reattach()
        if newest is not None:
            self.trainer.resume(newest)
            self.trainer.phase = phase
            rest = ": trained to the end, delivering again" if self.trainer.step >= self.length.total_steps else ""
            self.reporter.event(f"resumed at step {self.trainer.step} from {newest.name}{rest}", self.trainer.step)
        notes = [self.initial.notes, *(method.notes() for method in self.methods)]
        for line in [] if newest else [line for lines in notes for line in lines]:
            self.reporter.event(line, 0)
        comm.on_rank0(lambda: (self.run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8"))

    def attach(self) -> None:
        """Trace the model on rank 0, hand the coupled units to every rank, attach the methods."""
        if not self.methods:
            return
        if any(method.compresses for method in self.methods):
            self.coupling = self.initial.on_rank0(lambda model, call: speedup.coupling(model, *call, **self.settings()))
        resumed = checkpoint.latest(self.run_dir) is not None
        on_device = partial(self.initial.real, device=comm.device())
        costs = cost_file.latencies(self.config, on_device, self.run_dir, resumed)
        length = self.length
        context = Context(
            self.config, self.model, self.projection, self.coupling,
            length.num_micro, length.total_steps, length.steps_per_epoch, self.example, costs, self.measure,
            lambda listener, num_steps: calibrate(self.trainer, listener, num_steps), self.backend.rest,
        )  # fmt: skip
        for method in self.methods:
            method.attach(context)

    def check_exports(self) -> None:
        """What cannot be exported is refused before anything is trained."""
        targets = {name: spec for m in self.methods for name, spec in m.foresee(self.model, self.example).items()}
        self.initial.on_rank0(lambda model, call: export.check_ready(self.config.export, model, targets, call))

    def measure(self, num_samples: int) -> dict[str, float]:
        """Metrics of the model as it is now on so many training samples, drawn by the seed, without augmentation."""
        return self.trainer.evaluate(Sample(self.data.train, num_samples, self.config.seed))

    def settings(self) -> dict[str, Any]:
        """What coupling and plan have to agree on. Local."""
        config = self.config.speedup
        return {"norm": config.norm, "keep": config.keep, "barrier": config.barrier}

    def detach(self) -> None:
        """No decision follows: leave the zeros in the weights, and nothing else of what the methods do."""
        for method in reversed(self.methods):
            method.detach()
        self.projection.finish()
        self.added = [name for method in self.methods for name in method.added()]

    def cut(self, plan: Plan | None) -> None:
        """Slice the zeros away by `plan`, and all that the methods hold; what is left of the zeros stays."""
        if plan is not None:
            apply(self.model, plan)
            if not any(p.is_meta for p in self.model.parameters()):
                self.builder.placed(self.model)
            self.plan = plan.without(self.added)
        for method in self.methods:
            method.rebase(lambda tensors: apply_to_state(plan, tensors) if plan else tensors)

    def follow(self, plan: Plan | None, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors shaped like parameters, sliced as these were. Local."""
        tensors = apply_to_state(plan, tensors) if plan else tensors
        for method in self.methods:
            tensors = method.follow(tensors)
        return tensors

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is now, logged under the step boundary it stands at.

        Every rank holds the same replicas here: one that drifted would be measured, and later delivered, on some ranks
        only. Raises RuntimeError naming the first tensor that differs.
        """
        self.projection.project()
        self._check_replicas()
        metrics = self.trainer.evaluate()
        series = {f"eval/{name}": value for name, value in metrics.items()}
        for method in self.methods:
            series.update(method.metrics())
        self.reporter.log(self.trainer.step, series)
        return metrics

    def _check_replicas(self) -> None:
        """Of what several ranks hold: the model, or what is not sharded of it, and the parts of replicas."""
        layout = self.projection.layout
        every = self.model.named_parameters(remove_duplicate=False)  # of tied ones all names
        parts = {name for name, _ in every if not layout.is_whole(name)}
        check_copies(layout, sorted(parts), self.trainer.step)
        marks = tensor_fingerprints({n: t for n, t in self.model.state_dict().items() if n not in parts})
        try:
            comm.check_equal("fingerprint of the weights", fingerprint_of(marks), self.trainer.step)
        except RuntimeError:
            for name, mark in marks.items():
                comm.check_equal(f"fingerprint of {name}", mark, self.trainer.step)
            raise

    def train(self) -> None:
        """All steps of the run, and what falls between them."""
        for step, event in self.events():
            self.trainer.train(until=step)
            event()
        self.trainer.train(until=self.length.total_steps)

    def events(self) -> list[tuple[int, Callable[[], None]]]:
        """What falls on step boundaries beside decisions, in order, without what a resumed run has behind it."""
        change, shrink = self.change_window()
        events: list[tuple[int, Callable[[], None]]] = []
        if shrink is not None and self.trainer.phase != SMALL:
            events.append((shrink, self.shrink))
        for method in self.methods:
            if (step := method.start_step(shrink)) is not None:
                events.append((step, partial(self.start, method)))
        first = min([step for step, _ in events] + ([] if change is None else [change]), default=None)
        if first is not None and self.trainer.phase not in (CHANGING, SMALL):
            events.insert(0, (first, self.dense))
        return sorted(events, key=lambda event: event[0])  # on one boundary in this order

    def change_window(self) -> tuple[int | None, int | None]:
        """The step boundaries of the first decision and of the shrink (the last decision, or speedup.at), if any."""
        length = self.length
        steps = sorted({step + 1 for method in self.methods for step in method.change_steps()})
        at = self.config.speedup.at
        if at is None or not steps:
            return (steps[0], steps[-1]) if steps else (None, None)
        shrink = duration(at, "speedup.at", length.total_steps, length.steps_per_epoch)
        if shrink < steps[-1]:
            raise UserError(
                f"speedup.at={at!r} is step {shrink}, before the last pruning decision at step {steps[-1]}. "
                "Raise it, leave it null, or end pruning.schedule earlier."
            )
        if shrink > length.total_steps:
            raise UserError(
                f"speedup.at={at!r} is step {shrink}, but the run has {length.total_steps}. Lower it, give it as a "
                "fraction of the run, or leave it null."
            )
        return steps[0], shrink

    def dense(self) -> None:
        """What the model is before anything changes it; the decisions of this boundary are not taken yet."""
        self.outcome.before(self.evaluate())
        self.reporter.event(self.outcome.line("before"), self.trainer.step)
        self.trainer.phase = CHANGING

    def start(self, method: Method) -> None:
        """A method looks at the model or at data, and acts from here on."""
        self.trainer.settle()
        for line in method.start():
            self.reporter.event(line, self.trainer.step)
        if method.adjective:
            self.outcome.became(method.adjective, self.evaluate())
            self.reporter.event(self.outcome.line(method.adjective), self.trainer.step)
        self.trainer.save()

    def shrink(self) -> None:
        """No decision follows: make the zeros disappear, here and in the optimizer's state. Rank 0 plans, every rank
        slices what it holds; masked and shrunk must agree on inputs nobody has seen."""
        self.trainer.settle()
        self.outcome.compressed(self.methods, self.evaluate())
        self.reporter.event(self.outcome.line("masked"), self.trainer.step)
        self.detach()
        masked = self.answers()
        zeros = self.zeros() if self.backend.sharded and self.config.speedup.enabled else None
        weights = self.trainer.release()
        plan = self.planned(zeros) if self.config.speedup.enabled else None
        self.cut(plan)
        self.trainer.rebuild(lambda moments: self.follow(plan, moments), self.source(plan, weights))
        if plan is not None and (shipped := self.plan) is not None:
            self.verify(masked, shipped)
            comm.on_rank0(lambda: (shipped.save(self.run_dir), plan.save(self.run_dir / SHRUNK_BY)))
        for line in [line for method in self.methods for line in method.reattach()]:
            self.reporter.event(line, self.trainer.step)
        if plan is not None:
            self.outcome.became("shrunk", self.evaluate())
            self.reporter.event(self.outcome.line("shrunk"), self.trainer.step)
        self.trainer.phase = SMALL
        self.trainer.save()

    def answers(self) -> list[Any]:
        """Of the model as it is now, on held-out samples and on noise."""
        try:
            return answers(self.model, probes(self.data.example, self.config.seed))
        finally:
            self.backend.rest()

    def zeros(self) -> dict[str, torch.Tensor]:
        """Slices of sharded parameters that are all zeros."""
        return slice_masks(self.backend.layout, [name for name, _ in self.model.named_parameters()])

    def planned(self, zeros: dict[str, torch.Tensor] | None) -> Plan:
        """The plan of rank 0, on every rank. `zeros`: where the model is on the meta device."""

        def plan() -> Plan:
            model = self.model if zeros is None else on_meta(self.model)
            fold = not any(method.substitutes() for method in self.methods)
            settings = {"round_to": self.config.speedup.round_to, "masks": zeros, "fold": fold, **self.settings()}
            return speedup.plan(model, *self.example, **settings)

        found = comm.on_rank0(plan)
        comm.check_equal("fingerprint of the plan", found.fingerprint(), self.trainer.step)
        return found

    def source(self, plan: Plan | None, weights: Parts) -> Callable[[str], torch.Tensor] | None:
        """Where the weights of a sharded model come from when it is wrapped again: one after the other, whole and
        sliced."""
        if not self.backend.sharded:
            return None
        new = plan.bias if plan else {}
        return lambda name: new[name] if name in new else self.follow(plan, {name: weights.whole(name)})[name]

    def verify(self, masked: list[Any], shipped: Plan) -> None:
        """Raise RuntimeError on every rank unless the small model answers as the masked one did."""
        shrunk = self.answers()
        found = comm.on_rank0(lambda: difference(masked, shrunk))
        self.outcome.verified(found, shipped)
        changed = self.config.speedup.norm == "plain"  # asked for: norms over fewer numbers are another function
        if not changed and not found <= self.config.speedup.tolerance:
            raise RuntimeError(
                f"masked and shrunk model differ by {found:.3g} (relative), more than speedup.tolerance="
                f"{self.config.speedup.tolerance:g}: nothing is exported. Raise speedup.tolerance only if you can "
                "explain that; started again, the run goes on from its last checkpoint."
            )

    def deliver(self) -> None:
        """Evaluate, export, check what was exported, write the summary and the report."""
        self.trainer.settle()
        if self.length.total_steps and not checkpoint.has(self.run_dir, self.trainer.step):
            self.trainer.save()  # so that whatever stops the delivery, training is done
        if self.backend.sharded:
            changes = any(method.adjective for method in self.methods)  # `finish` leaves another model
            known = None if changes else (self.evaluate(), self.store())
            self.collect()
            stored = comm.on_rank0(lambda: self.finish_alone(known))
        else:
            self.trainer.release()  # what is exported is called as the user wrote it
            stored = self.finish()
        for name, number in stored.items():
            self.reporter.event(f"{name} {number:,}", self.trainer.step)

        def ship() -> None:
            for name in self.config.export:
                format = export.find(name)
                format.export(self.run_dir, self.model, self.plan, self.config, self.example)
                held_out = self.data.example(getattr(format, "NUM_CHECKED", 2))
                self.outcome.exported(name, format.check(self.run_dir, self.model, held_out))
            self.outcome.latencies(self.builder.student(), self.model)
            self.reporter.summary(self.outcome.finish(stored), self.outcome.shown())

        comm.on_rank0(ship)
        self.reporter.close()

    def finish(self, known: Known | None = None) -> dict[str, float]:
        """Training is over: leave in the model what is delivered. `known`: metrics and store of it. Returns what there
        is to say of a teacher store."""
        self.projection.project()
        for method in self.methods:
            self.outcome.finished(method.finish(*self.data.example(CHECKED)))
        metrics, stored = known or (self.evaluate(), self.store())
        self.outcome.after(self.model, metrics)
        self.projection.finish()
        return stored

    def store(self) -> dict[str, float]:
        """Write the teacher store, if one is asked for: each rank its part of it."""
        layout = self.projection.layout
        stored = distillation.write_store(self.config, self.model, layout, self.data.train, self.augmentation)
        self.backend.rest()
        return stored

    def finish_alone(self, known: Known | None) -> dict[str, float]:
        """`finish` on rank 0, which holds the whole model, and evaluates it alone. Rank 0 only."""
        with comm.alone():
            return self.finish(known)

    def collect(self) -> None:
        """Bring a sharded model whole to rank 0; on the others its parameters are on the meta device."""
        self.projection.restore()
        for method in self.methods:
            method.conclude()
        weights = self.trainer.release()
        gather_to_rank0(self.model, weights)
        self.projection.layout = Layout(self.model)


def _refuse_other_results(run_dir: Path, config: Config) -> None:
    """A folder with the results of a run is that configuration's, whether or not it still has checkpoints."""
    told = run_dir / "config.yaml"
    if (run_dir / "summary.json").is_file() and told.is_file():
        checkpoint.check_config(run_dir, yaml.safe_load(told.read_text(encoding="utf-8")), config)
