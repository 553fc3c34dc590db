"""The loop: equal bits at any number of ranks, resuming, missing micro-batches, batch norm, clipping."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from loop_jobs import Counter, config, same, trainer, weights
from torch import nn
from torch.nn import functional as F

from dist_compress import backends, comm
from dist_compress.backends import Backend
from dist_compress.config import Config
from dist_compress.errors import UserError
from dist_compress.method import Method
from dist_compress.training import checkpoint
from dist_compress.training.task import Classification

SIZES = (1, 2, 3, 4)


def train(cfg: Config) -> tuple[dict, dict, list[float]]:
    t = trainer(cfg)
    t.train(t.length.total_steps)
    return weights(t), t.evaluate(), [series["train/loss"] for _, series in t.reporter.series]


def train_without_reduction(cfg: Config) -> dict[str, torch.Tensor]:
    backend = backends.find("ddp")[0]
    kept = backend.backward, backend.finish_gradients
    backend.backward, backend.finish_gradients = Backend.backward, Backend.finish_gradients  # type: ignore
    try:
        return train(cfg)[0]
    finally:
        backend.backward, backend.finish_gradients = kept  # type: ignore[method-assign]


def test_exact_training_has_equal_bits_at_any_number_of_ranks(ranks):
    single = ranks(1, train, config())[0]
    assert len(set(single[2])) == 12
    for n in SIZES[1:]:
        for state, scores, losses in ranks(n, train, config()):
            assert same(state, single[0]), f"weights differ at {n} ranks"
            assert scores == single[1] and losses == single[2]


def test_the_bits_differ_without_the_reduction_and_with_plain_sums(ranks):
    single = ranks(1, train, config())[0][0]
    first, second = ranks(2, train_without_reduction, config())
    assert not same(first, single) and not same(first, second)
    plain = [ranks(n, train, config(exact=False))[0][0] for n in SIZES]
    assert not all(same(state, plain[0]) for state in plain[1:])
    for state in plain[1:]:  # but it is the same training
        assert torch.allclose(state["linear.weight"], plain[0]["linear.weight"], atol=1e-4)


def one_step(cfg: Config) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    t = trainer(cfg)
    inputs = [t.data.train.batch(*t.feed.stream.micro(0, j))["inputs"] for j in range(5)]
    first = [t.model.conv1(x).detach().double() for x in inputs]  # type: ignore[operator]
    t.train(1)
    return weights(t), first


@pytest.mark.parametrize("exact", [True, False])
def test_running_statistics_are_those_of_the_micro_batches(ranks, exact):
    for n in (1, 4):  # at 4 ranks, three of them run a dummy
        for state, first in ranks(n, one_step, config(exact=exact)):
            mean = torch.stack([x.mean((0, 2, 3)) for x in first]).mean(0)
            variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in first]).mean(0)
            assert torch.allclose(state["bn1.running_mean"].double(), 0.1 * mean, atol=1e-6)
            assert torch.allclose(state["bn1.running_var"].double(), 0.9 + 0.1 * variance, atol=1e-6)
            assert state["bn1.num_batches_tracked"] == 1


def count_micros() -> tuple[list[int], int]:
    counter = Counter()
    trainer(config(), [counter]).train(2)
    return counter.micros, counter.steps


@pytest.mark.parametrize("n", SIZES)
def test_missing_micro_batches_reach_no_method(ranks, n):
    results = ranks(n, count_micros)
    for rank, (micros, steps) in enumerate(results):
        assert micros == [j for j in range(5) if j % n == rank] * 2 and steps == 2


def start_and_stop(cfg: Config) -> dict[str, torch.Tensor]:
    t = trainer(cfg, [Counter()])
    t.train(7)
    return weights(t)


def go_on(cfg: Config) -> tuple[dict[str, torch.Tensor], int, int]:
    counter = Counter()
    t = trainer(cfg, [counter])
    folder = checkpoint.latest(Path(cfg.run_dir or ""))
    assert folder is not None
    t.resume(folder)
    resumed_at = t.step
    t.train(12)
    return weights(t), resumed_at, counter.steps


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_run_resumes_to_the_same_bits_on_any_number_of_ranks(ranks, tmp_path, at):
    cfg = config()
    whole = ranks(1, train, cfg)[0][0]
    cfg.run_dir, cfg.checkpoint.every_steps = str(tmp_path), 5
    stopped = ranks(at, start_and_stop, cfg)[0]
    assert not same(stopped, whole)
    cfg.checkpoint.every_steps = None  # may differ
    for n in SIZES:
        for state, resumed_at, steps in ranks(n, go_on, cfg):
            assert resumed_at == 5 and steps == 12 and same(state, whole), f"{at} ranks, then {n}"


def test_optimizer_state_is_part_of_what_resumes(ranks, tmp_path):
    cfg = config()
    whole = ranks(1, train, cfg)[0][0]
    cfg.run_dir, cfg.checkpoint.every_steps = str(tmp_path), 5
    ranks(1, start_and_stop, cfg)
    assert not same(ranks(1, go_on_without_moments, cfg)[0], whole)


def go_on_without_moments(cfg: Config) -> dict[str, torch.Tensor]:
    t = trainer(cfg, [Counter()])
    state = checkpoint.load(Path(cfg.run_dir or "") / "checkpoints" / "step_00000005")
    t.load_state({**state, "optim": {}})
    t.train(12)
    return weights(t)


def clip(max_norm: float) -> tuple[float, dict[str, torch.Tensor]]:
    cfg = config(clip_norm=max_norm)
    cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.kwargs, cfg.optim.schedule = 1.0, 0.0, {}, "constant"
    t = trainer(cfg)
    before = weights(t)
    t.train(1)
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in t.model.named_parameters()])
    return float(moved.norm()), t.reporter.series[0][1]


def test_clipping_bounds_the_whole_gradient(ranks):
    for moved, series in ranks(2, clip, 0.01):
        assert moved == pytest.approx(0.01, rel=1e-3) and series["train/grad_norm"] > 0.01


class HalfCount(Classification):
    """A task whose count varies with the batch: only even classes count."""

    fixed_count = False

    def loss(self, output, batch):
        return (F.cross_entropy(output, batch["targets"], reduction="none") * (batch["targets"] % 2 == 0)).sum()

    def count(self, batch):
        return int((batch["targets"] % 2 == 0).sum())

    def metrics(self, output, batch):
        return {"seen": (batch["targets"] % 2 == 0).sum()}


def train_half() -> tuple[dict[str, torch.Tensor], list[float], dict[str, float]]:
    t = trainer(config())
    t.task = HalfCount()
    t.train(2)
    return weights(t), [s["train/seen"] for _, s in t.reporter.series], t.evaluate()


def test_a_count_that_varies_is_summed_over_the_ranks(ranks):
    single, seen, scores = ranks(1, train_half)[0]
    assert seen == [1.0, 1.0] and scores["seen"] == 1.0
    for n in (2, 4):
        for state, others, score in ranks(n, train_half):
            assert same(state, single) and others == seen and score == scores


class Explode(Method):
    def loss(self, step, batch, output):
        return output.sum() * (float("nan") if step == 2 and comm.rank() == 0 else 0.0)


def explode() -> tuple[str, int, bool]:
    t = trainer(config(), [Explode()])
    try:
        t.train(12)
    except UserError as error:
        finite = all(torch.isfinite(p).all() for p in t.model.parameters())
        return str(error), t.step, finite
    return "", t.step, True


def test_a_loss_that_is_no_number_stops_every_rank_before_the_weights_are_spoilt(ranks):
    for text, step, finite in ranks(2, explode):
        assert "loss is nan at step 2" in text and "optim.lr" in text and step == 2 and finite


class Root(Method):
    """Adds 0 * sqrt(0): nothing to the loss, NaN to the gradients."""

    def loss(self, step, batch, output):
        return (output * 0).square().sum().sqrt() * 0 if step == 3 else None


def spoil(run_dir: str) -> tuple[str, str]:
    cfg = config()
    cfg.run_dir, cfg.checkpoint.every_steps = run_dir, 2
    t = trainer(cfg, [Root()])
    try:
        t.train(12)
    except UserError as error:
        return str(error), str(checkpoint.latest(Path(run_dir)))
    return "", ""


def test_weights_that_are_no_numbers_are_not_kept(ranks, tmp_path):
    for text, newest in ranks(2, spoil, str(tmp_path)):
        assert "weight is not finite at step 4" in text and newest.endswith("step_00000002")


class Kill(Method):
    """Sends this process the signal that a scheduler sends, on one rank only."""

    def after_step(self, step):
        if step == 2 and comm.rank() == comm.world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def interrupted(run_dir: str) -> tuple[int, int, str]:
    cfg = config()
    cfg.run_dir = run_dir
    t = trainer(cfg, [Kill()])
    try:
        t.train(12)
    except SystemExit as stop:
        return stop.code, t.step, str(checkpoint.latest(Path(run_dir)))  # type: ignore[return-value]
    return 0, t.step, ""


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(ranks, tmp_path):
    for code, step, folder in ranks(3, interrupted, str(tmp_path)):
        assert code == 75 and step == 4 and folder.endswith("step_00000004")


def shrink() -> tuple[bool, dict[str, torch.Tensor], torch.Tensor]:
    """Remove units 1 and 4 of conv1, in place, as a plan does; go on."""
    t = trainer(config())
    t.train(3)
    keep = torch.tensor([0, 2, 3, 5])
    dims = {"conv1.weight": 0, "bn1.weight": 0, "bn1.bias": 0, "conv2.weight": 1}

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: x.index_select(dims[n], keep) if n in dims else x for n, x in tensors.items()}

    before = cut({n: s["momentum_buffer"].clone() for n, s in t.state()["optim"].items()})
    t.release()
    for module, name in ((t.model.conv1, "conv1"), (t.model.bn1, "bn1"), (t.model.conv2, "conv2")):
        for key, value in list(module.named_parameters()):
            sliced = value.detach().index_select(dims[f"{name}.{key}"], keep)
            setattr(module, key, nn.Parameter(sliced))
    bn = t.model.bn1
    bn.running_mean, bn.running_var, bn.num_features = bn.running_mean[keep], bn.running_var[keep], 4  # type: ignore
    t.rebuild(cut)
    after = {n: s["momentum_buffer"] for n, s in t.state()["optim"].items()}
    kept = same({n: v.clone() for n, v in after.items()}, before)
    t.train(6)
    return kept, weights(t), t.model.bn1.running_mean  # type: ignore[return-value]


def test_training_goes_on_after_a_shrink_with_its_moments(ranks):
    single = ranks(1, shrink)[0][1]
    for n in (2, 3):
        for kept, state, mean in ranks(n, shrink):
            assert kept and same(state, single) and mean.shape == (4,)


def test_bfloat16_trains_and_evaluates(ranks):
    for state, scores, losses in ranks(2, train, config(precision="bf16", max_steps=3)):
        assert len(losses) == 3 and scores["loss"] > 0 and state["conv1.weight"].dtype == torch.float32


def lifted() -> tuple[bool, bool, bool]:
    t = trainer(config())
    mask = torch.zeros(6, 1, 1, 1)
    mask[:3] = 1.0
    t.projection.add("conv1.weight", "mask", lambda latent: latent * mask)
    t.train(2)
    t.settle()
    zero = not t.model.conv1.weight[3:].any()  # type: ignore[index, union-attr]
    saved = bool(t.state()["model"]["conv1.weight"][3:].all())
    return zero, saved, not t.model.conv1.weight[3:].any()  # type: ignore[index, union-attr]


def test_the_state_holds_the_latent_weights_and_the_model_the_compressed_ones(ranks):
    assert ranks(1, lifted) == [(True, True, True)]
