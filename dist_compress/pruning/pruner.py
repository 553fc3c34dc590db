"""The pruner: asks metrics for scores when the schedule says so, selects, and keeps the masks on.

A decision is collective and takes place between optimizer step and projection, on latent weights. The
owner of a unit set scores it in float64 (of sharded weights it is sent what it lacks); the first collective of
the selection of blocks hands all scores to all ranks, which then spend the ratio by the same integer arithmetic.
What was removed stays removed, unless the method says otherwise: then it may decide again after the schedule, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dist_compress import comm
from dist_compress.config import Config
from dist_compress.config_list import overrides
from dist_compress.errors import UserError
from dist_compress.layout import device_of
from dist_compress.method import Context, Method
from dist_compress.pruning import mask as masking
from dist_compress.pruning import results
from dist_compress.pruning.activations import Activations, add_fingerprint
from dist_compress.pruning.aligning import Tensors, align, check_aligned
from dist_compress.pruning.block_data import BlockData
from dist_compress.pruning.budget import budgets
from dist_compress.pruning.config_list import resolve
from dist_compress.pruning.distribution import distribute
from dist_compress.pruning.elements import GRAD, Elements
from dist_compress.pruning.evidence import Evidence, local_view, view
from dist_compress.pruning.frozen import Frozen
from dist_compress.pruning.listener import Listener
from dist_compress.pruning.running import Running
from dist_compress.pruning.schedule import decisions, due
from dist_compress.pruning.scorers import scorers_of
from dist_compress.pruning.search import Search
from dist_compress.pruning.seen import Seen
from dist_compress.pruning.solving import solve
from dist_compress.pruning.unit_decision import UnitDecision
from dist_compress.pruning.unit_listeners import refuse_compiled, unit_listeners
from dist_compress.pruning.unit_scores import by_set, own_scores
from dist_compress.pruning.units import collect
from dist_compress.sites import Sites
from dist_compress.statistic import totals

Masks = dict[str, torch.Tensor]


def build(config: Config) -> list[Method]:
    """The pruner of the run, if any: all entries of the config list, whatever their methods."""
    wanted = config.pruning.method is not None or any(
        isinstance(entry, dict) and entry.get("method") is not None for entry in config.pruning.config_list
    )
    return [Pruner(config)] if wanted else []


class Pruner(Method):
    """Targets by `pruning.config_list`; at each decision `removed` and the masks grow."""

    def __init__(self, config: Config) -> None:
        self.config = config.pruning
        self.history: list[tuple[int, float, str]] = []  # (optimizer steps taken, sparse ratio so far, fingerprint)
        self.seen = Seen()
        self.frozen: Frozen | None = None  # the masks of a model that was shrunk since

    def attach(self, context: Context) -> None:
        """Collect targets and check that they can be met. The same on every rank, checked. Collective. UserError."""
        self.context, model = context, context.model
        sites = Sites(model, *context.example) if context.example else None
        self.settings = resolve(self.config, model, sites)
        self.scorers = scorers_of(self.settings)
        distribute(self.settings, self.scorers, model)
        self.activations = Activations(self.settings, model, sites)
        self.sets, self.kept = collect(self.settings, context.coupling, model, self.activations.members())
        self.elements = Elements(self.settings, model, context.coupling, self.config.compute, self.scorers)
        if not self.sets and not self.elements.groups:
            reasons = "; ".join(f"{k.name}: {k.reason}" for k in self.kept[:10]) or "All it names is aligned"
            raise UserError(
                f"pruning.config_list: no target can be pruned. {reasons}. Name other modules, or what these "
                "are coupled with; pruning=none trains without."
            )
        self.removed = [torch.zeros(s.num_units, dtype=torch.bool) for s in self.sets]
        for s in self.sets:
            self.scorers[s.targets[0]].check(view(s, context.projection.latent))
        self.budgets = budgets(self.sets, self.settings, context)
        for group in self.budgets.values():
            group.wanted(1.0)
        sizes = {gid: len(group.sets) for gid, group in self.budgets.items()}
        self.search = Search(self.config.search, context.config.seed, sizes, context.evaluate)
        self.tensors = Tensors(context.projection, self.activations.targets)
        check_aligned(self.tensors, self.settings, self._masked())
        driven = [s for s in self.settings if not s.align and (s.activation or self.scorers[s.name].data_driven)]
        self.schedule = decisions(
            self.config.schedule,
            context.total_steps,
            context.steps_per_epoch,
            driven[0].method if driven else "",
            max((float(s.sparse_ratio) for s in self.settings if not s.align), default=0.0),
        )
        first, *later = sorted(self.schedule)
        self.due = due(self.schedule, self.settings, self.scorers, context.total_steps, context.steps_per_epoch)
        # Each decision hears the steps since the one before it, the first as many, a single one those of an epoch.
        heard = later[0] - first if later else max(round(context.steps_per_epoch), 1)
        self.listen_from = max(first - heard, 0)
        refuse_compiled(context.config.train, self.sets, self.scorers)
        self.unit_listeners = unit_listeners(model, self.activations, self.sets, self.scorers, context.num_micro)
        self.block_data = BlockData(self.elements, model, self.scorers, context.num_micro)
        self.running = Running(self.elements, self.scorers)
        self.listeners: dict[str, Listener] = {**self.unit_listeners, **self.block_data.listeners()}
        self._listen(0)
        self.activations.install()  # what listens hears what comes before the masks
        self._check_order()
        self.evidence: Evidence | None = None

    def _check_order(self) -> None:
        """Of what flat buffers are made of. Collective. Raises UserError where the ranks differ in it."""
        weights = [f"parameter {name} {list(p.shape)}" for name, p in self.context.model.named_parameters()]
        targets = [f"target {s.name}: {s.method} {s.granularity} {s.sparse_ratio}" for s in self.settings]
        units = [f"units of {' + '.join(s.targets)}: {s.num_units}" for s in self.sets]
        comm.check_order("parameters and pruning targets", [*weights, *targets, *units])

    def _placed(self) -> Evidence:
        """Who decides what. Asked for once the model is as it will be trained: wrapped, and sharded or not. Local."""
        if self.evidence is None:
            projection = self.context.projection
            self.elements.place(projection.layout)
            self.evidence = Evidence(projection, self.sets, self.elements, self.scorers)
        return self.evidence

    def change_steps(self) -> list[int]:
        return [t - 1 for t in self.due]

    def after_backward(self, step: int, micro: int) -> None:
        for listener in self.listeners.values():
            if listener.active and self._heard_in(step, listener):
                listener.add(micro)

    def _heard_in(self, step: int, listener: Listener) -> bool:
        return listener.from_start or step >= self.listen_from

    def _listen(self, step: int) -> None:
        """Let the hooks work in step `step` only if it is heard."""
        for listener in self.listeners.values():
            listener.awake = self._heard_in(step, listener)

    def before_step(self, step: int) -> None:
        if self.frozen is None and step < max(self.schedule):
            projection = self.context.projection
            for s in self.sets:
                metric = self.scorers[s.targets[0]]
                metric.edit_gradients(local_view(s, projection), projection.layout.grad)
        if self.frozen is None and step < max(self.due):
            self.running.step(self._placed())
        if self.frozen is None and step + 1 in self.due:
            self._placed().keep_gradients(self.due[step + 1])
        self._listen(step + 1)

    def after_step(self, step: int) -> None:
        if self.frozen is None and step + 1 in self.due:
            self.decide(step + 1)

    def decide(self, t: int) -> None:
        """Spend the share of the ratio due after `t` optimizer steps. Collective."""
        self._placed()
        kept = list(self.removed), dict(self.elements.removed)
        try:
            mark = self._decide(t)
        except BaseException:  # the masks of before go on to act, and to be saved
            self.removed, self.elements.placed.bits = kept
            raise
        if t in self.schedule:
            for listener in [x for x in self.listeners.values() if not x.from_start]:
                listener.statistic.reset()
        self._close_listeners_after(t)
        between = bool(self.history) and self.history[-1][0] not in self.schedule
        self.seen.close(t, between)
        if between:
            self.history.pop()  # of the decisions beside the schedule the last one is told
        self.history.append((t, self.sparse_ratio(), mark))

    def _decide(self, t: int) -> str:
        """Take the decision and put the masks on if all ranks agree on them. Returns their fingerprint. Collective."""
        fraction = self.schedule[max(s for s in self.schedule if s <= t)]
        evidence, projection = self._placed(), self.context.projection
        acting = add_fingerprint(masking.fingerprint(projection.layout, projection.masks()), self.activations.on())
        found = evidence.gather(self.due[t])
        units = any(s.targets[0] in self.due[t] for s in self.sets)
        sums = self._totals(t, units)
        scores = own_scores(evidence, found, self.unit_listeners, sums) if units else torch.zeros(0).double()
        inputs = self.block_data.heard(self.due[t], sums.get("inputs"))
        heard = evidence.rows(found, GRAD) | inputs | self.running.heard(self.due[t])
        bits = scores.view(torch.int64)  # each has one owner and is zero elsewhere, so the sum of the bits is a copy
        choice = self.elements.choose(t, fraction, self.due[t], evidence.rows(found), heard, [bits])
        if units:
            self._decide_units(t, fraction, by_set(scores, self.sets))
        self.elements.take(choice)
        if solved := [x for x in self.block_data.solved if x.setting.name in self.due[t]]:
            solve(solved, self.due[t], self.block_data.alone, evidence, found, fraction)
        mark, counts = self._put_on(t, acting, list(choice.tally.values()))
        self.seen.now |= dict(zip(choice.tally, counts, strict=True))
        self.elements.reset(choice, projection.latent)
        return mark

    def _totals(self, t: int, units: bool) -> Masks:
        """What listeners heard, by their names, as sums over all ranks. Collective if anything was to be heard."""
        due: dict[str, Listener] = dict(self.unit_listeners) if units else {}
        if self.block_data.inputs and self.block_data.wanted(self.due[t]):
            due["inputs"] = self.block_data.inputs
        return dict(zip(due, totals([listener.statistic for listener in due.values()]), strict=True))

    def _decide_units(self, t: int, fraction: float, scores: list[torch.Tensor]) -> None:
        decision = UnitDecision(self.sets, self.budgets, self.scorers, self.due[t], scores, self.removed)
        decision.alone(fraction)
        if self.search.pending:
            self.search.run(lambda weights: self._measure(t, lambda: decision.shared(1.0, weights)))
        decision.shared(fraction, self.search.found)
        decision.tell(self.seen)

    def _measure(self, t: int, spend: Callable[[], None]) -> float:
        """The objective of the model as `spend` leaves it, which is undone afterwards. Collective."""
        before, projection = list(self.removed), self.context.projection
        spend()
        self._put_on(t)
        projection.project()
        value = self.search.objective()
        projection.restore()
        self.removed[:] = before
        comm.check_equal("the objective of the search", value.hex(), t)
        return value

    def masks(self) -> Masks:
        """{parameter: bool, True = keep} of every parameter that may be masked, broadcastable to what this rank holds
        of it. Those of activations are in the model. Collective if others follow a sharded parameter."""
        return self._masks()[0]

    def _masks(self) -> tuple[Masks, Masks]:
        """Those of parameters and those of activations."""
        if self.frozen is not None:
            return self.frozen.masks, self.activations.on()
        masks = self._target_masks() | self.activations.masks(self.sets, self.removed)
        align(self.tensors, self.settings, masks)
        activations = {name: masks.pop(name) for name in self.activations.targets if name in masks}
        return masks, activations

    def _target_masks(self) -> Masks:
        masks = masking.unit_masks(self.context.projection.layout, self.sets, self.removed)
        for name, own in self.elements.masks().items():
            masks[name] = masks[name] & own if name in masks else own
        return masks

    def _masked(self) -> list[str]:
        """The targets that have a mask of their own, parameters by their first names."""
        names = masking.owners(self.context.model)
        units = [names[m.fqn] for s in self.sets for m in s.masked]
        return list(dict.fromkeys([*units, *(t.name for t in self.elements.tensors()), *self.activations.members()]))

    def _put_on(
        self, step: int, acting: masking.Mark | None = None, also: Sequence[torch.Tensor] = ()
    ) -> tuple[str, list[torch.Tensor]]:
        """Hand the masks to the projection. Collective. Raises RuntimeError on every rank, and changes nothing, where
        the ranks disagree, or where `acting`, what acted until now, is not what was decided.

        Returns their fingerprint, and the sums of `also`, int64 tensors, over the ranks."""
        (masks, activations), projection = self._masks(), self.context.projection
        marks = {} if acting is None else {"the pruning masks before the decision": acting}
        new = add_fingerprint(masking.fingerprint(projection.layout, masks), activations)
        placed = None if self.frozen is not None else self._placed().elements.placed
        counts = [] if placed is None else [placed.own_counts()]
        said, sums = masking.agreed({**marks, "pruning masks": new}, step, [*counts, *also])
        if acting is not None and self.history and said[0] != self.history[-1][2]:
            raise RuntimeError(
                f"The pruning masks changed before step {step}: their fingerprint is {said[0]}, but the decision at "
                f"step {self.history[-1][0]} left {self.history[-1][2]}."
            )
        if placed is not None:
            placed.set_counts(sums.pop(0))
        self.activations.put_on(activations)
        masking.put_on(projection, masks, self.elements.decays(self.scorers) if self.frozen is None else {})
        return said[-1], sums

    def detach(self) -> None:
        """Zero the masked weights for good, in the latent too; leave projection and hooks. No decision
        follows."""
        self.frozen = Frozen(self.context.projection.layout, self.masks())
        self.conclude()
        for listener in self.listeners.values():
            listener.close()

    def conclude(self) -> None:
        projection = self.context.projection
        for name, mask in self._masks()[0].items():
            with torch.no_grad():
                projection.latent(name).masked_fill_(~mask, 0)
            masking.take_off(projection, name)

    def rebase(self, transform: Callable[[Masks], Masks]) -> None:
        assert self.frozen is not None, "detach before a shrink"
        self.frozen.rebase(transform)

    def reattach(self) -> list[str]:
        """What stayed in the shrunk model masked (single weights, units that could not be removed) stays masked from
        here on. Collective; of a sharded model masks are brought together and sliced one after the other."""
        assert self.frozen is not None, "detach before a shrink"
        layout = self.context.projection.layout
        self.frozen.settle(layout)
        self.frozen.masks |= self.activations.settle(layout, self.frozen.masks)
        self._put_on(self.history[-1][0] if self.history else 0)
        return []

    def sparse_ratio(self) -> float:
        """Units and single weights removed, as a fraction of all that are free to go."""
        tensors = self.elements.tensors()
        gone = sum(int(r.sum()) for r in self.removed) + sum(self.elements.num_removed(t) for t in tensors)
        return gone / (sum(len(r) for r in self.removed) + sum(t.num for t in tensors))

    def notes(self) -> list[str]:
        return overrides(self.settings)

    def added(self) -> list[str]:
        return self.activations.buffers()

    def metrics(self) -> dict[str, float]:
        """`fingerprint/masks` is cut to its low 52 bits here, which a float holds; `results` has all 64."""
        if not self.history:
            return {"pruning/sparse_ratio": 0.0}
        _, ratio, mark = self.history[-1]
        return {"pruning/sparse_ratio": ratio, "fingerprint/masks": float(int(mark, 16) % 2**52)}

    def results(self) -> dict[str, Any]:
        """`fingerprint/masks`; `decisions` [{step, ratio, fingerprint}]; `search`; `scores`, which the report shows;
        and `results.rows`."""
        layout, units = self.context.projection.layout, (self.settings, self.sets, self.removed)
        return {
            **results.rows(*units, self.kept, self.budgets, self.elements, layout),
            "fingerprint/masks": self.history[-1][2] if self.history else "",
            "decisions": [{"step": t, "ratio": ratio, "fingerprint": mark} for t, ratio, mark in self.history],
            "search": self.search.results(self.sets, self.removed),
            "scores": self.seen.rows,
        }

    def state_dict(self) -> dict[str, Any]:
        """Collective. The keys do not change over a run but for `masks`, which replaces decisions after a
        shrink."""
        told = {"history": json.dumps(self.history), "scores": self.seen.state()}
        if self.frozen is not None:
            masks = masking.gathered(self.context.projection.layout, self.frozen.masks)
            return {"masks": masks, "activations": self.activations.on(), **told}
        none = torch.zeros(0, dtype=torch.bool)
        self._placed()  # a checkpoint is written in training
        return {
            "units": torch.cat([none, *self.removed]),
            "elements": self.elements.placed.state_dict(),
            "statistics": {heard: x.statistic.state_dict() for heard, x in self.listeners.items()},
            "running": self.running.state_dict(),
            "search": self.search.state(),
            **told,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Collective. Raises UserError when the state belongs to other targets."""
        self.history = [tuple(item) for item in json.loads(state["history"])]
        self.seen.load(state["scores"])
        if "masks" in state:
            assert self.frozen is not None, "a shrunk state goes to a pruner that was rebased"
            layout, device = self.context.projection.layout, device_of(self.context.model)
            self.frozen.masks = {n: layout.part(n, mask.to(device)) for n, mask in state["masks"].items()}
            self.activations.put_on({name: mask.to(device) for name, mask in state["activations"].items()})
            self._put_on(self.history[-1][0])
            return
        sizes = {t.name: t.num for t in self.elements.tensors()}
        elements = {name: state["elements"].get(name) for name in sizes}
        known = state["units"].numel() == sum(len(r) for r in self.removed)
        if not known or any(e is None or len(e) != sizes[n] for n, e in elements.items()):
            raise UserError(
                "The checkpoint was written with another pruning.config_list or model. Resume with the config that "
                "lies in the run folder, or start anew with another run_dir."
            )
        self.removed = list(state["units"].cpu().split([len(r) for r in self.removed]))
        self._placed()
        self.elements.placed.load_state_dict(elements)
        self.running.load_state_dict(state["running"])
        self.search.load_state(state["search"])
        for heard, listener in self.listeners.items():
            listener.statistic.load_state_dict(state["statistics"][heard])
            listener.awake = True
        if self.history:
            t, _, mark = self.history[-1]
            self._close_listeners_after(t)
            if self._put_on(t)[0] != mark:
                raise RuntimeError(
                    f"The masks of the checkpoint (decided at step {t}) do not have its fingerprint {mark}."
                )

    def _close_listeners_after(self, t: int) -> None:
        if t == max(self.due):
            for listener in self.listeners.values():
                listener.close()
