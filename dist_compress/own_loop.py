"""Compression inside a training loop of one's own: hooks on the loss and on the optimizer, no trainer.

    c = dist_compress.attach(model, optimizer, recipe, args=(example,), total_steps=1000)
    for x, y in batches:
        c.loss(criterion(model(x), y)).backward()
        c.step()                                    # or optimizer.step(), wherever it is called
        optimizer.zero_grad()
    small, report = c.finish()

Works where somebody else calls the optimizer (Hugging Face Trainer, Lightning): what has to happen around a step hangs
on the optimizer itself. The laws are those of a run: N ranks decide what one would, masked equals shrunk. With a
`run_dir` the results are those of a run, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from dist_compress import comm, compose, cost_file, distillation, pruning, quantization, run_folder, speedup
from dist_compress.config import Config, load
from dist_compress.errors import UserError
from dist_compress.method import Context, Method
from dist_compress.moments import State, state_by_name, transformed
from dist_compress.own_folder import OwnFolder
from dist_compress.projection import Projection
from dist_compress.speedup import Plan, apply, apply_to_state
from dist_compress.speedup.masking import duplicate
from dist_compress.training import optim

_SECTIONS = ("pruning", "speedup", "seed", "quantization", "distillation")  # the last two are refused, if asked for

Recipe = str | Sequence[str] | Mapping[str, Any]
Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    total_steps: int,
    steps_per_epoch: float | None = None,
    micro_batches: int = 1,
    evaluate: Evaluate | None = None,
    run_dir: str | Path | None = None,
) -> Attached:
    """Attach the methods of `recipe` to a model in training. Collective: every rank calls it alike.

    `model`: as it is, or wrapped by DistributedDataParallel. `optimizer`: one of its parameters, elementwise.
    `recipe`: the name of a recipe of conf/recipe, a list of overrides such as ["+recipe=resnet_prune",
    "pruning.sparse_ratio=0.3"], or a mapping with the sections `pruning` and `speedup`; the rest of a configuration
    is your loop's. `args`, `kwargs`: an example of a call. `total_steps`: optimizer steps of the training to come;
    `micro_batches`: backward passes of each rank before a step. `evaluate`: a function of the model in eval mode, its
    loss or several metrics by name, the same on every rank: `pruning.search` minimises the loss, the report shows them
    all. `run_dir`: where `finish` leaves summary.json, report.html and what `dist_compress.load` reads; None: nowhere.
    Raises UserError for what does not fit.
    """
    config = _config(recipe)
    return Attached(
        config, model, optimizer, (args, kwargs or {}), total_steps, steps_per_epoch or total_steps, micro_batches,
        evaluate, run_dir,
    )  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """What `Attached.finish` found. The same on every rank."""

    plan: Plan | None  # None with speedup.enabled=false: the zeros stay in the model
    difference: float  # max|shrunk - masked| / max|masked| on the example and on noise like it
    parameters: tuple[int, int]  # before and after
    results: dict[str, Any]  # of the methods: decisions, asked and given for each group, what was kept and why


class Attached:
    """A model whose training compresses it. Made by `attach`."""

    def __init__(
        self, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, example: tuple[Any, dict[str, Any]],
        total_steps: int, steps_per_epoch: float, micro_batches: int,
        evaluate: Evaluate | None, run_dir: str | Path | None,
    ) -> None:  # fmt: skip
        kind = type(optimizer).__name__
        if kind in optim.REFUSED:
            raise UserError(
                f"{kind} cannot be used: {optim.REFUSED[kind]}, so its state is not elementwise and cannot follow "
                "masks and slices. Choose for example SGD or AdamW."
            )
        comm.join(config.backend.timeout_s)
        self.config, self.optimizer, self.example = config, optimizer, example
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.micro_batches, self.step_count, self.micro = micro_batches, 0, 0
        self.projection = Projection(self.model)
        if distillation.wanted(config.distillation):
            raise UserError(
                f"attach: distillation.method={config.distillation.method!r}: the losses of your loop are yours. Add "
                "dist_compress.distillation.losses.divergence to them, and take distillation out of the recipe."
            )
        if quantization.build(config):
            raise UserError(
                "attach: quantization needs the calibration of a run. Set quantization.method=null here, and no method "
                "in quantization.config_list."
            )
        if config.speedup.at is not None:
            raise UserError(
                f"attach: speedup.at={config.speedup.at!r}: finish() shrinks the model. Leave it null here."
            )
        self.methods: list[Method] = pruning.build(config)
        if not self.methods:
            raise UserError("attach: the recipe asks for nothing; set pruning.method and pruning.config_list.")
        asked = config.speedup
        self.settings: dict[str, Any] = {"norm": asked.norm, "keep": asked.keep, "barrier": asked.barrier}
        coupling = comm.on_rank0(lambda: speedup.coupling(self.model, *self.example, **self.settings))
        num_micro = micro_batches * comm.world_size()
        self.objective = evaluate
        self.finished = False
        self.folder: OwnFolder | None = None
        if run_dir is not None:
            self.folder = OwnFolder(config, run_folder.choose(str(run_dir)), self.model, self.example, total_steps)
        context = Context(
            config, self.model, self.projection, coupling, num_micro, total_steps, steps_per_epoch, self.example,
            cost_file.latencies(
                config, lambda measure: measure(self.model, self.example), self.folder and self.folder.run_dir
            ),
            evaluate=self._loss if evaluate else None,
        )  # fmt: skip
        for method in self.methods:
            method.attach(context)
        changes = [step + 1 for method in self.methods for step in method.change_steps()]
        self.first, self.last = min(changes), max(changes)
        if self.folder:
            self.folder.attached(coupling, self.model, [line for method in self.methods for line in method.notes()])
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())
        self._decide()

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch, to call `backward` on: its gradients are heard. Local."""
        if self.micro >= self.micro_batches:
            raise UserError(
                f"attach: backward pass {self.micro + 1} before the optimizer step, but micro_batches="
                f"{self.micro_batches}. Pass the number of backward passes of a step to attach(micro_batches=...)."
            )
        loss = loss * 1.0  # a tensor of our own, so that the hook is called once
        loss.register_hook(self._when_backward_ends)
        return loss

    def step(self) -> None:
        """`optimizer.step()`, with decisions and masks around it. Collective when a decision falls."""
        self.optimizer.step()

    def finish(self) -> tuple[nn.Module, Finished]:
        """Shrink the model in place, and the optimizer's state with it. Collective.

        Returns the model without its wrapper, in the mode it was in, and what became of it. A wrapper such as
        DistributedDataParallel has to be built anew around it; the optimizer goes on. With a `run_dir` the model is
        delivered into it. Raises UserError when the last decision has not been taken, RuntimeError when masked and
        shrunk differ.
        """
        self._refuse_finished("finish")
        if self.step_count < self.last:
            raise UserError(
                f"attach: finish() after {self.step_count} optimizer steps, but the last decision falls after "
                f"{self.last}. Train on, pass a smaller total_steps, or let pruning.schedule end earlier."
            )
        self.projection.project()
        results = {key: value for method in self.methods for key, value in method.results().items()}
        if self.folder:
            self.folder.compressed(self.methods, self._metrics(), self.step_count)
        names: dict[torch.Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        state = state_by_name(self.optimizer, names)
        for method in reversed(self.methods):
            method.detach()
        self.projection.finish()
        added = [name for method in self.methods for name in method.added()]
        masked = duplicate(self.model)
        if self.folder:
            self.folder.keep(masked)
        before = sum(p.numel() for p in masked.parameters())
        plan = self._plan(masked) if self.config.speedup.enabled else None
        if plan is not None:
            apply(self.model, plan)
        for method in self.methods:  # zeros that could not go stay zero while this optimizer goes on
            method.rebase(lambda tensors: apply_to_state(plan, tensors) if plan else tensors)
        self.projection.project()
        difference = comm.on_rank0(lambda: speedup.difference(masked, self.model, *self.example))
        changed = self.config.speedup.norm == "plain"  # asked for: norms over fewer numbers are another function
        if not changed and not difference <= self.config.speedup.tolerance:
            raise RuntimeError(
                f"masked and shrunk model differ by {difference:.3g} (relative), more than speedup.tolerance="
                f"{self.config.speedup.tolerance:g}."
            )
        for method in self.methods:
            method.reattach()
        self._rebind(names, transformed(state, lambda moments: self._follow(plan, moments)))
        self.projection.project()
        after = sum(p.numel() for p in self.model.parameters())
        self.finished, shipped = True, plan and plan.without(added)
        if self.folder:
            metrics = self._metrics()
            if shipped is not None:
                self.folder.shrunk(shipped, difference, metrics, self.step_count)
            self.folder.deliver(self.model, {}, metrics)
        return self.model, Finished(shipped, difference, (before, after), results)

    def deliver(self, before: Mapping[str, float] | None = None, after: Mapping[str, float] | None = None) -> None:
        """Write the model as it is now into `run_dir`, and the results anew: once the small model is fine-tuned, or
        measured. Collective. `before`, `after`: metrics of the dense and of this model, beside those of `evaluate`."""
        if self.folder is None or not self.finished:
            raise UserError("attach: deliver() writes the small model. Attach with run_dir=..., call finish() first.")
        self.projection.project()
        self.folder.deliver(self.model, before or {}, {**self._metrics(), **(after or {})})

    def state_dict(self) -> dict[str, Any]:
        """All that this loop resumes from: model, with the weights beneath the masks, optimizer, decisions and step.
        Between two steps. Collective; the same on every rank, but for what the model's own buffers differ in."""
        self._refuse_finished("state_dict")
        with self.projection.lifted():
            model = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return {
            "step_count": self.step_count,
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "methods": [method.state_dict() for method in self.methods],
            "folder": self.folder.state() if self.folder else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, saved at any number of ranks, of this recipe and architecture: right after `attach` to
        the dense model. Collective."""
        self._refuse_finished("load_state_dict")
        if cost_file.wanted(self.config) and self.config.pruning.latency.table is None:
            raise UserError(
                "attach: latencies measured anew would decide otherwise than those of the state. Set "
                "pruning.latency.table to the costs.json of the first run_dir, or to a table of your own."
            )
        self.projection.restore()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(saved)
        self.step_count, self.micro = state["step_count"], 0
        if self.folder and state["folder"] is not None:
            self.folder.load(state["folder"])
        self.projection.project()

    def _refuse_finished(self, what: str) -> None:
        if self.finished:
            raise UserError(f"attach: {what}() after finish(): nothing is attached any more. Save the small model.")

    @torch.no_grad()
    def _metrics(self) -> dict[str, float]:
        """What the user's function, if any, says of the model in eval mode."""
        if self.objective is None:
            return {}
        training = self.model.training
        try:
            found = self.objective(self.model.eval())
        finally:
            self.model.train(training)
        values = found if isinstance(found, Mapping) else {"loss": found}
        return {name: float(value) for name, value in values.items()}

    def _loss(self, num_samples: int) -> dict[str, float]:
        """What a search minimises; how many samples it is of is up to the user's function."""
        metrics = self._metrics()
        if "loss" not in metrics:
            raise UserError(
                f"attach: pruning.search minimises a loss, but evaluate returned {', '.join(metrics)}. Return a "
                "number, or add 'loss'."
            )
        return metrics

    def _when_backward_ends(self, grad: torch.Tensor) -> None:
        Variable._execution_engine.queue_callback(self._heard)

    def _heard(self) -> None:
        micro = self.micro * comm.world_size() + comm.rank()
        for method in self.methods:
            method.after_backward(self.step_count, micro)
        self.micro += 1

    def _before(self) -> None:
        for method in reversed(self.methods):
            method.before_step(self.step_count)
        self.projection.edit_gradients()
        self.projection.restore()

    def _after(self) -> None:
        self.step_count, self.micro = self.step_count + 1, 0
        self._decide()

    def _decide(self) -> None:
        if self.folder and self.step_count == self.first:
            self.folder.before(self._metrics(), self.step_count)
        for method in self.methods:
            method.after_step(self.step_count - 1)
        self.projection.project()

    def _plan(self, masked: nn.Module) -> Plan:
        """What goes of a model with zeros. Rank 0 plans; collective."""
        round_to = self.config.speedup.round_to
        plan: Plan = comm.on_rank0(lambda: speedup.plan(masked, *self.example, round_to=round_to, **self.settings))
        comm.check_equal("fingerprint of the plan", plan.fingerprint(), self.step_count)
        return plan

    def _follow(self, plan: Plan | None, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors shaped like parameters, sliced as these were."""
        tensors = apply_to_state(plan, tensors) if plan else tensors
        for method in self.methods:
            tensors = method.follow(tensors)
        return tensors

    def _rebind(self, names: Mapping[torch.Tensor, str], state: State) -> None:
        """The model's parameters are others now than those of `names`: the optimizer goes on with them and `state`."""
        new = dict(self.model.named_parameters())
        for group in self.optimizer.param_groups:
            group["params"] = [new[names[p]] for p in group["params"]]
        self.optimizer.state.clear()
        for name, values in state.items():
            self.optimizer.state[new[name]] = values


def _config(recipe: Recipe) -> Config:
    if isinstance(recipe, Mapping):
        config = load(dict(recipe))
        if others := [str(key) for key in recipe if key not in _SECTIONS]:
            raise UserError(
                f"attach: {', '.join(others)} of the recipe would have no effect: they are your loop's. Only "
                f"{' and '.join(_SECTIONS[:2])} count here."
            )
        return config
    overrides = [f"+recipe={recipe}"] if isinstance(recipe, str) else list(recipe)
    return compose.compose(compose.parse(overrides))
