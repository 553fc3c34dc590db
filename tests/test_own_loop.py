"""Compression in a loop of one's own: the same decisions at any number of ranks, and what users get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_compress
from dist_compress import comm, compose, models, outcome, run
from dist_compress.calling import call
from dist_compress.errors import UserError
from dist_compress.own_loop import attach
from dist_compress.training import data
from dist_compress.training.data.stream import Feed, Stream
from dist_compress.training.schedule import run_length

EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9)),)
RECIPE = {
    "pruning": {
        "method": "taylor",
        "sparse_ratio": 0.5,
        "schedule": {"name": "linear", "start": "2steps", "end": "4steps", "num_decisions": 2},
        "config_list": [{"op_types": ["Conv2d"]}],
    }
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(5, 3, 8, 8, generator=generator), torch.randint(0, 4, (5,), generator=generator)


def trained(num_steps: int, lr: float, recipe: Any = RECIPE, wrap: bool = True) -> dict[str, Any]:
    """Five lines around a plain loop; 12 micro-batches a step whatever the number of ranks."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    each = 12 // comm.world_size()
    c = attach(model, optimizer, recipe, EXAMPLE, total_steps=num_steps, micro_batches=each)
    if wrap and comm.is_initialized():
        module: nn.Module = DistributedDataParallel(model)
    else:
        module = model
    for step in range(num_steps):
        optimizer.zero_grad()
        for micro in range(each):
            x, y = batch(step, micro * comm.world_size() + comm.rank())
            c.loss(nn.functional.cross_entropy(module(x), y)).backward()
        c.step()
    small, finished = c.finish()
    x, y = batch(99, 0)
    nn.functional.cross_entropy(small(x), y).backward()
    optimizer.step()  # goes on with the small parameters and their sliced moments
    moments = [tuple(s["momentum_buffer"].shape) for s in optimizer.state.values()]
    return {
        "decisions": finished.results["decisions"],
        "plan": finished.plan.fingerprint(),
        "parameters": finished.parameters,
        "equal": finished.difference <= 1e-5,
        "moments": moments == [tuple(p.shape) for p in small.parameters()],
        "channels": (small[0].out_channels, small[3].out_channels),
    }


def test_ranks_decide_what_one_would(ranks: Any) -> None:
    """With weights that stand still the micro-batches are all that a decision depends on."""
    one = ranks(1, trained, 5, 0.0)[0]
    assert one["channels"] == (4, 3) and one["equal"] and one["moments"]
    assert one["parameters"][1] < one["parameters"][0] / 2 and len(one["decisions"]) == 2
    for size in (2, 3, 4):
        assert ranks(size, trained, 5, 0.0) == [one] * size


def test_ranks_agree_while_they_train(ranks: Any) -> None:
    a, b = ranks(2, trained, 5, 0.05)
    assert a == b and a["channels"] == (4, 3) and a["equal"]


def measured(model: nn.Module) -> dict[str, float]:
    assert not model.training
    x, y = batch(50, 0)
    outputs = model(x)
    return {
        "loss": float(nn.functional.cross_entropy(outputs, y)),
        "accuracy": float((outputs.argmax(1) == y).float().mean()),
    }


def with_folder(run_dir: str) -> dict[str, Any]:
    """A loop whose results go to a folder; a step of fine-tuning, then the results again."""
    outcome.LATENCY_S = 0.05
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    c = attach(model, optimizer, RECIPE, EXAMPLE, total_steps=5, evaluate=measured, run_dir=run_dir)
    module: nn.Module = DistributedDataParallel(model) if comm.is_initialized() else model
    for step in range(6):
        if step == 5:
            module, finished = c.finish()
            first = json.loads((Path(run_dir) / "summary.json").read_text())
            loaded = dist_compress.load(run_dir, model=net())
            module.load_state_dict(loaded.state_dict())  # it fits
        x, y = batch(step, comm.rank())
        loss = nn.functional.cross_entropy(module(x), y)
        (loss if step == 5 else c.loss(loss)).backward()
        c.step()
        optimizer.zero_grad()
    c.deliver(before={"top5": 0.5}, after={"top5": 0.75})
    outputs = module.eval()(EXAMPLE[0])
    return {
        "first": first,
        "plan": f"{finished.plan.fingerprint():016x}",
        "outputs": outputs,
        "masks": finished.results["fingerprint/masks"],
    }


@pytest.mark.parametrize("size", [1, 2])
def test_a_folder_has_the_results_of_a_run(ranks: Any, tmp_path: Path, size: int) -> None:
    told = ranks(size, with_folder, str(tmp_path))
    for rank in told:
        assert {k: rank[k] for k in ("first", "plan", "masks")} == {k: told[0][k] for k in ("first", "plan", "masks")}
    first, last = told[0]["first"], json.loads((tmp_path / "summary.json").read_text())
    assert first["params/before"] == sum(p.numel() for p in net().parameters()) > first["params/after"]
    assert (
        first["macs/before"] == 8 * 27 * 36 + 6 * 72 * 16 + 24 and first["macs/after"] == 4 * 27 * 36 + 3 * 36 * 16 + 12
    )
    assert first["fingerprint/plan"] == told[0]["plan"] and first["fingerprint/masks"] == told[0]["masks"]
    assert first["verify/max_rel_diff"] <= 1e-5 and first["export/safetensors/max_rel_diff"] <= 1e-6
    assert (
        first["loss/masked"] == pytest.approx(first["loss/shrunk"], rel=1e-5)
        and first["loss/after"] == first["loss/shrunk"]
    )
    assert first["loss/before"] != first["loss/masked"] and "accuracy/before" in first
    assert (first["world_size"], first["backend"]) == (size, "own loop") and "top5/after" not in first
    assert last["loss/after"] != first["loss/after"] and (last["top5/before"], last["top5/after"]) == (0.5, 0.75)
    loaded = dist_compress.load(tmp_path, model=net())
    assert torch.equal(loaded(EXAMPLE[0]), told[0]["outputs"])
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert [d["step"] for d in facts["methods"]["decisions"]] == [2, 4]
    page = (tmp_path / "report.html").read_text()
    assert "<title>Sequential" in page and "digits" not in page and "Kept channels per layer" in page
    assert "masked: accuracy" in page and last["fingerprint/masks"][:4] in page
    with pytest.raises(UserError, match=r"its Sequential was trained in a loop of its owner's.*model=Sequential"):
        dist_compress.load(tmp_path)


def stopped(file: str, num_steps: int, lr: float, run_dir: str | None = None) -> None:
    """The loop of `trained`, up to a state in a file."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    c = attach(model, optimizer, RECIPE, EXAMPLE, total_steps=5, micro_batches=12 // comm.world_size(), run_dir=run_dir)
    advance(c, model, optimizer, 0, num_steps)
    state = c.state_dict()
    if comm.rank() == 0:
        torch.save(state, file)


def advance(c: Any, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        for micro in range(12 // comm.world_size()):
            x, y = batch(step, micro * comm.world_size() + comm.rank())
            c.loss(nn.functional.cross_entropy(model(x), y)).backward()
        c.step()


def resumed(file: str, lr: float, run_dir: str | None = None) -> dict[str, Any]:
    """The rest of it, from other initial weights."""
    outcome.LATENCY_S = 0.05
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    c = attach(model, optimizer, RECIPE, EXAMPLE, total_steps=5, micro_batches=12 // comm.world_size(), run_dir=run_dir)
    c.load_state_dict(torch.load(file, weights_only=True))
    advance(c, model, optimizer, c.step_count, 5)
    small, finished = c.finish()
    return {
        "decisions": finished.results["decisions"], "plan": finished.plan.fingerprint(),
        "weights": [p.detach().clone() for p in small.parameters()],
    }  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_a_loop_that_was_stopped_decides_the_same_on_other_ranks(ranks: Any, tmp_path: Path, num_steps: int) -> None:
    """After 1 step statistics are open, after 3 units are gone and more will go, after 4 nothing is left to decide."""
    one = ranks(1, trained, 5, 0.0)[0]
    file = str(tmp_path / "state.pt")
    ranks(2, stopped, file, num_steps, 0.0, str(tmp_path / "run"))
    [again] = ranks(1, resumed, file, 0.0, str(tmp_path / "run"))
    assert again["decisions"] == one["decisions"] and again["plan"] == one["plan"]
    told = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert told["step"] == 2 and told["text"].startswith("before: ")


def test_a_loop_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Moments and the weights beneath the masks come back."""
    file = str(tmp_path / "state.pt")
    stopped(file, 0, 0.05)
    whole = resumed(file, 0.05)
    stopped(file, 3, 0.05)
    assert torch.load(file)["model"]["0.weight"].flatten(1).ne(0).any(1).all()
    again = resumed(file, 0.05)
    assert again["decisions"] == whole["decisions"]
    assert all(torch.equal(a, b) for a, b in zip(again["weights"], whole["weights"], strict=True))


SAME = [
    "+recipe=smoke", "logger=none", "data.image_size=12", "train.max_steps=8", "train.eval_batch_size=90",
    "pruning.method=taylor", "pruning.schedule.start=2steps", "pruning.schedule.end=6steps",
    "pruning.schedule.num_decisions=3", "optim.lr=0", "optim.weight_decay=0", "checkpoint.every_steps=null",
]  # fmt: skip


def as_a_run(run_dir: str) -> dict[str, Any]:
    outcome.LATENCY_S = 0.05
    Path(run_dir).mkdir()
    run.run(compose.compose(compose.parse([*SAME, f"run_dir={run_dir}"])))
    return results_in(run_dir)


def as_a_loop(run_dir: str) -> dict[str, Any]:
    """The weights and micro-batches of that run in a loop of one's own, with the same recipe."""
    outcome.LATENCY_S = 0.05
    config = compose.compose(compose.parse(SAME))
    dataset = data.build(config.data, config.seed)
    length, train = run_length(config, dataset.train.num_samples), config.train
    model = models.build(config.model, dataset.num_classes, config.seed)
    stream = Stream(dataset.train.num_samples, config.seed, train.global_batch_size, train.micro_batch_size)
    feed = Feed(dataset.train, stream, length.num_micro)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    each, left_over = divmod(length.num_micro, comm.world_size())
    assert left_over == 0
    args, kwargs = dataset.example(2)
    c = attach(
        model, optimizer, SAME, args, kwargs, total_steps=length.total_steps,
        steps_per_epoch=length.steps_per_epoch, micro_batches=each, run_dir=run_dir,
    )  # fmt: skip
    module: nn.Module = DistributedDataParallel(model) if comm.is_initialized() else model
    for step in range(length.total_steps):
        for micro in range(comm.rank(), length.num_micro, comm.world_size()):
            sample = feed.batch(step, micro)
            output = call(module, sample["inputs"])
            total = nn.functional.cross_entropy(output, sample["targets"], reduction="sum")
            c.loss(total * (1 / train.global_batch_size)).backward()
        c.step()
        optimizer.zero_grad()
        if c.step_count == c.last:
            c.finish()
            return results_in(run_dir)
    raise AssertionError("the last decision falls into the loop")


def results_in(run_dir: str) -> dict[str, Any]:
    folder = Path(run_dir)
    summary, facts = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "facts"))
    same = ("fingerprint/masks", "fingerprint/plan", "params/before", "params/after", "macs/before", "macs/after")
    told = {name: facts["methods"][name] for name in ("decisions", "targets", "kept_channels")}
    return {**told, **{name: summary[name] for name in same}, "plan": (folder / "plan.json").read_text()}


def test_a_loop_decides_what_a_run_would(ranks: Any, tmp_path: Path) -> None:
    [whole] = ranks(1, as_a_run, str(tmp_path / "run"))
    assert len({d["fingerprint"] for d in whole["decisions"]}) == 3
    for size in (1, 2):
        assert ranks(size, as_a_loop, str(tmp_path / f"loop_{size}")) == [whole] * size


def limited(num_steps: int) -> Any:
    pruning = {**RECIPE["pruning"], "sparse_ratio": None, "at_most": {"params": 250}}
    return trained(num_steps, 0.0, {"pruning": pruning, "speedup": {"round_to": 2, "keep": ["3.bias"]}})


def test_limits_of_the_whole_model_and_settings_of_the_speedup(ranks: Any) -> None:
    one = ranks(1, limited, 5)[0]
    assert one["channels"] == (2, 6) and one["parameters"][1] <= 250 and one["equal"]  # no output of 3 goes
    assert ranks(2, limited, 5) == [one] * 2


def test_recipes_by_name_and_by_overrides() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    overrides = ["+recipe=resnet_prune", "pruning.method=l1_norm", "pruning.compute=channels"]
    c = attach(model, optimizer, overrides, EXAMPLE, total_steps=10)
    assert c.config.pruning.method == "l1_norm" and c.last <= 10
    assert attach(net(), optimizer, "resnet_prune", EXAMPLE, total_steps=10).config.pruning.compute == "macs"


def test_masks_are_on_between_steps_and_the_optimizer_sees_what_is_beneath() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = {"pruning": {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": [{"op_names": ["0"]}]}}
    c = attach(model, optimizer, recipe, EXAMPLE, total_steps=3)
    dead = model[0].weight.flatten(1).eq(0).all(1)
    assert int(dead.sum()) == 4
    beneath = []
    optimizer.register_step_pre_hook(lambda *_: beneath.append(model[0].weight.flatten(1).eq(0).all(1).any()))
    for step in range(3):
        x, y = batch(step, 0)
        c.loss(nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()  # by whoever calls it
    assert not any(beneath) and torch.equal(model[0].weight.flatten(1).eq(0).all(1), dead)


def test_zeros_that_cannot_go_stay_zero_after_the_end() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    entry = {"op_names": ["3"], "granularity": "element"}
    recipe = {"pruning": {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": [entry]}}
    c = attach(model, optimizer, recipe, EXAMPLE, total_steps=1)
    for step in range(3):
        x, y = batch(step, 0)
        c.loss(nn.functional.cross_entropy(model(x), y)).backward()
        c.step()
        if step == 0:
            model, _ = c.finish()
            dead = model[3].weight == 0
    assert int(dead.sum()) == dead.numel() // 2 and torch.equal(model[3].weight == 0, dead)


def test_zeros_stay_in_a_model_that_is_not_to_be_shrunk() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruning = {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": [{"op_names": ["0"]}]}
    recipe = {"pruning": pruning, "speedup": {"enabled": False}}
    c = attach(model, optimizer, recipe, EXAMPLE, total_steps=1)
    for step in range(3):
        x, y = batch(step, 0)
        c.loss(nn.functional.cross_entropy(model(x), y)).backward()
        c.step()
        if step == 0:
            model, finished = c.finish()
    assert finished.plan is None and finished.difference == 0 and model[0].out_channels == 8
    assert int(model[0].weight.flatten(1).eq(0).all(1).sum()) == 4 and int(model[1].weight.eq(0).sum()) == 4


def test_what_cannot_be_asked_of_a_loop_that_is_done_or_not(tmp_path: Path) -> None:
    outcome.LATENCY_S = 0.05
    model = net()
    pruning = {"method": "l1_norm", "sparse_ratio": 0.5, "config_list": [{"op_names": ["0"]}]}
    recipe = {"pruning": pruning, "speedup": {"enabled": False}}
    c = attach(model, torch.optim.SGD(model.parameters(), 0.1), recipe, EXAMPLE, total_steps=1, run_dir=tmp_path)
    with pytest.raises(UserError, match=r"deliver\(\) writes the small model"):
        c.deliver()
    c.step()
    c.finish()
    for name in ("finish", "state_dict"):
        with pytest.raises(UserError, match=rf"{name}\(\) after finish\(\)"):
            getattr(c, name)()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["params/after"] == summary["params/before"] and not (tmp_path / "plan.json").exists()
    assert dist_compress.load(tmp_path, model=net())[0].weight.flatten(1).eq(0).all(1).sum() == 4


BY_ENTRY = {"config_list": [{"op_types": ["Linear"], "method": "qat"}]}  # and no quantization.method


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": torch.optim.LBFGS}, "LBFGS cannot be used: its history is over whole parameter vectors"),
        ({"recipe": {"pruning": {"method": None}}}, "the recipe asks for nothing; set pruning.method"),
        ({"recipe": {"prunning": {}}}, "prunning: no such key"),
        ({"recipe": {**RECIPE, "speedup": {"at": 0.9}}}, "speedup.at=0.9: finish\\(\\) shrinks the model"),
        ({"recipe": {**RECIPE, "train": {"exact": True}}}, "train of the recipe would have no effect"),
        ({"recipe": {**RECIPE, "quantization": {"method": "qat"}}}, "quantization needs the calibration of a run"),
        ({"recipe": {**RECIPE, "quantization": BY_ENTRY}}, "quantization needs the calibration of a run"),
        ({"recipe": "no_such"}, "no_such"),
        ({"backwards": 2}, "backward pass 2 before the optimizer step, but micro_batches=1"),
        ({"steps": 3}, "finish\\(\\) after 3 optimizer steps, but the last decision falls after 4"),
    ],
)
def test_what_users_get_wrong(change: dict[str, Any], said: str) -> None:
    model = net()
    optimizer = change.get("optimizer", torch.optim.SGD)(model.parameters(), 0.1)
    with pytest.raises(UserError, match=said):
        c = attach(model, optimizer, change.get("recipe", RECIPE), EXAMPLE, total_steps=5)
        for step in range(change.get("steps", 5)):
            for _ in range(change.get("backwards", 1)):
                x, y = batch(step, 0)
                c.loss(nn.functional.cross_entropy(model(x), y)).backward()
            c.step()
        c.finish()
