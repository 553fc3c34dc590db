"""Whole runs with activations as targets: verified, exported, loaded, resumed, at any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from whole_runs import killed_at

import dist_compress

LIST = (
    "pruning.config_list=["
    "{op_names:[layer1.0.bn1],target_names:[_output_0],sparse_ratio:0.5},"  # goes with its channels
    "{op_names:[layer2.0.conv1],target_names:[_output_0],sparse_ratio:0.25},"  # in part; the rest into its weights
    "{op_names:[layer1],target_names:[_output_],sparse_ratio:0.25},"  # stays: the shortcut of layer2 pads
    "{op_names:[layer3.0.bn1],target_names:[_input_input],granularity:[2,3,3],sparse_ratio:0.3},"  # blocks stay
    "{op_names:[linear],sparse_ratio:0.3,granularity:element,method:l1_norm}]"
)
OVERRIDES = [
    "+recipe=smoke", "data.image_size=12", "train.max_steps=6", "train.eval_batch_size=90", "pruning.method=taylor",
    "pruning.schedule.start=2steps", "pruning.schedule.end=4steps", "pruning.schedule.num_decisions=2",
    "checkpoint.every_steps=null", LIST,
]  # fmt: skip


def run(folder: str, stop: int | None = None) -> dict[str, Any]:
    from dist_compress import compose, outcome
    from dist_compress import run as runner

    outcome.LATENCY_S = 0.02
    Path(folder).mkdir(exist_ok=True)
    with killed_at(stop):
        runner.run(compose.compose(compose.parse([*OVERRIDES, f"run_dir={folder}"])))
    if not (Path(folder) / "summary.json").exists():
        return {}
    facts = json.loads((Path(folder) / "facts.json").read_text())
    summary = json.loads((Path(folder) / "summary.json").read_text())
    names = ("fingerprint/weights", "fingerprint/plan", "loss/masked", "loss/shrunk", "loss/after")
    return {**{name: summary[name] for name in names}, "decisions": facts["methods"]["decisions"], "all": summary}


@pytest.fixture(scope="module")
def one(ranks, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    return folder, ranks(1, run, str(folder))[0]


def test_verified_exported_and_loaded(one):
    folder, found = one
    assert found["all"]["verify/max_rel_diff"] <= 1e-5 and found["loss/masked"] == pytest.approx(found["loss/shrunk"])
    assert found["all"]["export/safetensors/max_rel_diff"] == 0.0
    assert len({d["fingerprint"] for d in found["decisions"]}) == 2
    model = dist_compress.load(folder)
    assert model.get_submodule("layer1.0.conv1").out_channels == 8
    left = {name for name, _ in model.named_buffers() if "pruning" in name}
    assert left == {"layer1.pruning_output_0", "layer3.0.bn1.pruning_input_0"}
    conv = model.get_submodule("layer2.0.conv1")
    assert int((conv.weight == 0).all((1, 2, 3)).sum()) + 32 - conv.out_channels == 8
    kept = []
    model.layer1.register_forward_hook(lambda _, args, out: kept.append(out))
    with torch.no_grad():
        model(torch.randn(3, 3, 12, 12))
    assert int((kept[0] == 0).all(-1).all(-1).all(0).sum()) >= 4
    stays = json.loads((folder / "model.json").read_text())["activation_masks"]
    assert [item["module"] for item in stays] == ["layer1", "layer3.0.bn1"]


@pytest.mark.parametrize(("step", "size", "then"), [(None, 2, 0), (3, 2, 1), (5, 1, 3)])
def test_equal_bits_at_any_number_of_ranks_and_after_a_resume(ranks, tmp_path, one, step, size, then):
    found = ranks(size, run, str(tmp_path), step)[0]
    if step is not None:
        found = ranks(then, run, str(tmp_path))[0]
    wanted = one[1]
    assert {k: v for k, v in found.items() if k != "all"} == {k: v for k, v in wanted.items() if k != "all"}


def test_code_that_a_folder_names_runs_only_with_trust(one, tmp_path):
    import shutil

    folder = shutil.copytree(one[0], tmp_path / "run")
    description = json.loads((folder / "model.json").read_text())
    description["activation_masks"][0]["apply_method"] = "os.path"
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(dist_compress.errors.UserError, match="masks of activations act by 'os.path'.*trust=True"):
        dist_compress.load(folder)


def own_loop() -> tuple[float, list[str], int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    entries = [
        {"op_names": ["1"], "target_names": ["_output_0"]},
        {"op_names": ["3"], "target_names": ["_input_0"], "apply_method": "add", "apply_options": {"constant": -9}},
    ]
    recipe = {"pruning": {"method": "apoz", "sparse_ratio": 0.5, "config_list": entries,
                          "schedule": {"name": "one_shot", "start": "2steps", "end": "2steps"}}}  # fmt: skip
    x = torch.randn(16, 8)
    compression = dist_compress.attach(model, optimizer, recipe, (x,), total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        compression.loss(model(x).square().mean()).backward()
        compression.step()
    _, finished = compression.finish()
    model(x)
    names = [name for name, _ in model.named_buffers()]
    return finished.difference, names + [n for n in finished.plan.keep if "pruning" in n], model[0].out_features


def test_in_a_loop_of_ones_own(ranks):
    assert ranks(2, own_loop) == ranks(1, own_loop) * 2
    difference, names, width = ranks(1, own_loop)[0]
    assert difference <= 1e-5 and names == ["3.pruning_input_0"] and width == 6
