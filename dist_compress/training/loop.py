"""The training loop. It knows no technique: methods add losses, read gradients and change weights in hooks.

Micro-batch j of a step is computed by rank j mod N, and every rank makes ceil(M / N) rounds; in the last one
some ranks may have no micro-batch and run a dummy, weighted zero, that touches no statistic. Losses are sums
over the samples divided by the count of the global batch: no number depends on how many ranks share the work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.backends import Backend
from dist_compress.backends.backend import Source
from dist_compress.config import Config
from dist_compress.method import Method
from dist_compress.moments import Transform, transformed
from dist_compress.parts import Parts
from dist_compress.projection import Projection
from dist_compress.training import determinism, optim
from dist_compress.training import state as saving
from dist_compress.training.batchnorm import BatchNormTracker
from dist_compress.training.data import Data, Split
from dist_compress.training.data.stream import Feed, Stream
from dist_compress.training.evaluation import as_row, autocast, evaluate
from dist_compress.training.schedule import LearningRate, run_length
from dist_compress.training.signals import Interrupted, StopRequest
from dist_compress.training.task import add_losses, caller


class Trainer:
    """Trains `model` in place. Every method of it is collective."""

    def __init__(
        self, config: Config, model: nn.Module, data: Data, task: Any,
        methods: Sequence[Method], backend: Backend, projection: Projection, reporter: Any, source: Any = None,
    ) -> None:  # fmt: skip
        """`reporter.log(step, {series: value})` is called on every rank; call `determinism.set_up` first. `source`: as
        in `Backend.wrap`. Raises UserError for sizes, schedules and optimizers that do not fit."""
        self.config, self.model, self.data, self.task = config, model, data, task
        self.methods, self.backend, self.projection = list(methods), backend, projection
        self.reporter = reporter
        train, num_samples = config.train, data.train.num_samples
        self.length = run_length(config, num_samples)
        self.rate = LearningRate(config.optim, self.length)
        stream = Stream(num_samples, config.seed, train.global_batch_size, train.micro_batch_size)
        self.feed = Feed(data.train, stream, self.length.num_micro)
        self.step = 0
        self.settled = self.stop_agreed = False  # settled: the decisions of this step boundary are taken
        self.phase = "train"  # a word of the caller's, kept in the checkpoint
        self.stop = StopRequest()
        self._build(source)

    def _build(self, source: Source | None = None) -> None:
        self.norms = BatchNormTracker(self.model)  # first: what wraps the model may have to see its hooks
        module = self.backend.wrap(self.model, source, [n for m in self.methods for n in m.unsharded()])
        self.names, undecayed = optim.trained(self.model), [n for m in self.methods for n in m.undecayed()]
        optimizer = optim.build(self.config.optim, self.names, undecayed)
        self.module, self.optimizer = self.backend.prepare(module, optimizer)
        self.projection.layout = self.backend.layout

    def release(self) -> Parts:
        """Take `model` out of its wrapping, to be shrunk in place or delivered; to train on, `rebuild`. Returns what
        this rank holds of the parameters, which are meta tensors in the model from here on if they are sharded."""
        self.module, layout = self.model, self.backend.layout
        weights = Parts.of(layout, {name: layout.local(name) for name, _ in self.model.named_parameters()})
        self._before, self._moments = weights, self.backend.moments(self.optimizer, self.names)
        self.norms.remove()
        self.backend.release()
        return weights

    def rebuild(self, transform: Transform, source: Source | None = None) -> None:
        """Go on after `model` was shrunk in place: new wrapping, and a new optimizer whose state is what
        `transform({parameter name: tensor})` makes of each kind of moment. `source`: as in `Backend.wrap`."""
        self._build(source)
        left = set(self.names.values())
        if self.backend.sharded:
            state = saving.resharded(self._moments, self._before, transform, self.backend.layout)
        else:
            state = transformed(self._moments, transform)
        self.backend.load_moments(self.optimizer, self.names, {n: s for n, s in state.items() if n in left})
        del self._moments, self._before

    def train(self, until: int) -> None:
        """Optimizer steps up to step `until` (exclusive), with decisions, checkpoints and logs on the way.

        The decisions of boundary `until` itself are left to `settle` or the next call, so that the caller can
        measure what was before them. Raises UserError when the loss is no number, and Interrupted (exit code 75)
        after SIGTERM or SIGUSR1 to any rank, once a checkpoint is written.
        """
        self.model.train()
        self._mark = (time.perf_counter(), self.step)
        with self.stop:
            while self.step < until:
                self.settle()
                means = self._one_step()
                if self.step == until or self.step % self.config.train.log_every_steps == 0:
                    self._log(means)

    def settle(self) -> None:
        """What happens between two steps, once: decisions, projection, then the checkpoint that is due."""
        if self.settled:
            return
        self.projection.restore()
        determinism.seed_for(self.config.seed, self.step, -1)  # what methods draw is the same on every rank
        for method in self.methods:
            method.after_step(self.step - 1)
        self.projection.project()
        self.settled = True
        every = self.config.checkpoint.every_steps
        if self.stop_agreed or (every and self.step and self.step % every == 0):
            self.save()
        if self.stop_agreed:
            raise Interrupted()

    def _one_step(self) -> dict[str, Any]:
        """Returns the step's loss and metrics, means over the global batch, the same on every rank."""
        step = self.step
        means = self._gradients(step)
        for method in reversed(self.methods):
            method.before_step(step)
        self.projection.edit_gradients()
        if self.config.train.clip_norm is not None:
            means["grad_norm"] = self.backend.clip(self.config.train.clip_norm)
        self.projection.restore(publish=False)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.backend.step(self.optimizer)
        self.step, self.settled = step + 1, False
        self.stop_agreed = bool(means.pop("stop"))
        return means

    def _gradients(self, step: int) -> dict[str, Any]:
        """All rounds of a step: gradients, batch norm statistics and the means over the global batch."""
        num_micro, ranks = self.length.num_micro, comm.world_size()
        micros = range(comm.rank(), -(-num_micro // ranks) * ranks, ranks)
        count = self.feed.global_count(self.task, step)
        rows, names = [], []
        self.norms.begin_step()
        self.optimizer.zero_grad()
        for round, micro in enumerate(micros):
            batch, live = self.feed.batch(step, micro), micro < num_micro
            records = self.norms.begin_micro(live)
            determinism.seed_for(self.config.seed, step, micro)
            with self.backend.sync_context(last := micro == micros[-1]):
                with autocast(self.config.train.precision):
                    output = caller(self.task)(self.module, batch["inputs"])
                losses = add_losses(self.task, self.methods, step, batch, output)
                self.backend.backward(losses["loss"] * (live / count), round, last)
            if live:
                for method in self.methods:
                    method.after_backward(step, micro)
            sums = {**losses, **self.task.metrics(output, batch), "stop": self.stop.requested}
            names = list(sums)
            rows.append(torch.cat([as_row(sums), records]))
        self.backend.finish_gradients()
        total = comm.ordered_sum(torch.stack(rows), num_micro)  # one flat collective for all statistics
        means = dict(zip(names, (total[: len(names)] / count).tolist(), strict=True))
        optim.check_loss(means["loss"], step, self.config.optim)
        self.norms.commit(total[len(names) :])
        return means

    def _log(self, means: dict[str, Any]) -> None:
        now, (then, before) = time.perf_counter(), self._mark
        self._mark = (now, self.step)
        series = {f"train/{name}": float(value) for name, value in means.items()}
        series["train/lr"] = self.rate(self.step - 1)
        series["train/samples_per_s"] = self.feed.stream.global_batch_size * (self.step - before) / (now - then)
        for method in self.methods:
            series.update(method.metrics())
        self.reporter.log(self.step, series)

    def evaluate(self, split: Split | None = None) -> dict[str, float]:
        """{"loss": .., "accuracy": ..} of the compressed weights, each sample of a split exactly once."""
        self.projection.project()
        size = self.config.train.eval_batch_size or self.config.train.micro_batch_size
        try:
            return evaluate(self.module, split or self.data.eval, self.task, size, self.config.train.precision)
        finally:
            self.backend.rest()

    def state(self) -> dict[str, Any]:
        """All that a run resumes from, as `state.of` has it."""
        return saving.of(self)

    def load_state(self, state: dict[str, Any]) -> None:
        saving.load(self, state)

    def save(self) -> Path | None:
        return saving.write(self)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of this model and configuration, of any backend and number of ranks."""
        saving.resume(self, folder)
