"""Whole runs that go wrong: refused on every rank by a message that names the key, with nothing lost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

QUICK = ["+recipe=smoke", "data.image_size=12", "train.eval_batch_size=90", "checkpoint.every_steps=null"]


class Small(nn.Module):
    """Quick to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.linear = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


class Output(nn.Module):
    """All channels of its only convolution are the output of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


def run_all(run_dir: str, *overrides: str) -> None:
    from dist_compress import compose, outcome, run

    Path(run_dir).mkdir(exist_ok=True)
    outcome.LATENCY_S = 0.1
    run.run(compose.compose(compose.parse([*QUICK, *overrides, f"run_dir={run_dir}"])))


def refusal(run_dir: str, *overrides: str) -> str:
    """What a rank raises, with its type."""
    try:
        run_all(run_dir, *overrides)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def contents(run_dir: Path) -> dict[str, str]:
    files = [path for path in sorted(run_dir.rglob("*")) if path.is_file()]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are not what they should be."""
    from PIL import Image
    from safetensors.torch import save_file

    from dist_compress.models.resnet_cifar import resnet20, resnet56

    folder = tmp_path_factory.mktemp("material")
    save_file(resnet56(num_classes=10).state_dict(), folder / "resnet56.safetensors")
    save_file(resnet20(num_classes=10).state_dict(), folder / "whole.safetensors")
    torch.save(resnet20(num_classes=10).state_dict(), folder / "whole.pt")
    for kind in ("safetensors", "pt"):
        whole = (folder / f"whole.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    for split in ("train", "test"):
        for name in "abc":
            (folder / "empty" / split / name).mkdir(parents=True)
            (folder / "three" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / "three" / split / name / "1.png")
    return folder


ENTRY = "pruning.config_list=[{op_names: [conv1], global_group_id: a, sparse_ratio: 0.2},"
REFUSED = {  # overrides; what is said; {} is the folder of the fixture
    "pattern": (
        ["pruning.config_list=[{op_names_re: ['stage9.*']}]"],
        "op_names_re='stage9.*' matches no module; names",
    ),
    "two groups": ([ENTRY + "{op_types: [Conv2d], global_group_id: b}]"], "conv1 is put in two groups"),
    "group": ([ENTRY + "{op_names: [conv2], global_group_id: a}]"], "Give both the same sparse_ratio"),
    "blocked": (["model._target_=tests_failures.Output"], "conv: is an output of the model"),
    "no folder": (["data=image_folder", "data.root=/nowhere"], "data.root='/nowhere': there is no such folder"),
    "no images": (["data=image_folder", "data.root={}/empty"], "empty/train (3 class folders). Expected"),
    "architecture": (["model.weights={}/resnet56.safetensors"], "3 missing: conv1.bias, conv2.weight, conv2.bias"),
    "cut": (["model.weights={}/cut.safetensors"], "cut.safetensors': truncated, damaged"),
    "cut torch": (["model.weights={}/cut.pt"], "cut.pt': truncated, damaged"),
    "few samples": (["data=image_folder", "data.root={}/three"], "3 evaluation samples for world size 4: fewer"),
    "few micros": (["train.micro_batch_size=8"], "3 micro-batches cannot occupy world size 4"),
    "format": (["export=[gguf]"], "no such format. Available: onnx, safetensors, torch_export, torchao."),
    "shrink": (["speedup.at=2steps"], "speedup.at='2steps' is step 2, before the last pruning decision"),
    "optimizer": (["optim.name=LBFGS"], "optim.name='LBFGS' cannot be used"),
}


def refusals(folder: str, material: str, names: list[str]) -> dict[str, str]:
    import sys

    sys.modules["tests_failures"] = sys.modules[__name__]  # a module on the user's path
    Path(folder).mkdir(exist_ok=True)
    small = "+model._target_=tests_failures.Small"
    return {
        name: refusal(f"{folder}/run", small, *(o.replace("{}", material) for o in REFUSED[name][0])) for name in names
    }


@pytest.mark.parametrize("size", [2, 4])
def test_what_cannot_work_is_refused_on_every_rank(ranks: Any, tmp_path: Path, material: Path, size: int) -> None:
    names = [name for name, (_, said) in REFUSED.items() if ("world size 4" in said) == (size == 4)]
    for texts in ranks(size, refusals, str(tmp_path / "a"), str(material), names):
        for name, text in texts.items():
            assert text.startswith("UserError: ") and REFUSED[name][1] in text, (name, text)


def test_a_finished_run_only_delivers_again_and_is_not_overwritten(ranks: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ranks(2, run_all, str(run_dir), "train.max_steps=6")
    first, metrics = contents(run_dir), (run_dir / "metrics.jsonl").read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    other = ["train.max_steps=6", "optim.lr=0.07"]
    for text in ranks(2, refusal, str(run_dir), *other):
        assert f"{run_dir} belongs to another configuration: optim.lr was 0.05, now 0.07" in text
    assert contents(run_dir) == first
    ranks(2, run_all, str(run_dir), "train.max_steps=6")
    again = json.loads((run_dir / "summary.json").read_text())
    assert {k: v for k, v in again.items() if "latency" not in k} == {
        k: v for k, v in summary.items() if "latency" not in k
    }
    assert (run_dir / "metrics.jsonl").read_text() == metrics
    assert contents(run_dir)["model.safetensors"] == first["model.safetensors"]
    assert "trained to the end, delivering again" in (run_dir / "events.jsonl").read_text()


def results_alone(run_dir: str) -> list[str]:
    import shutil

    from dist_compress import comm

    run_all(run_dir, "train.max_steps=4", "pruning=none", "export=[]")
    if comm.rank() == 0:
        shutil.rmtree(Path(run_dir) / "checkpoints")
    comm.barrier()
    before = contents(Path(run_dir))
    said = [
        refusal(run_dir, "train.max_steps=4", "pruning=none", "model=resnet56"),
        refusal(run_dir, "train.max_steps=4", "pruning=none", "optim.name=nonsense"),
    ]
    assert contents(Path(run_dir)) == before
    return said


def test_results_without_checkpoints_are_not_overwritten_by_another_run(ranks: Any, tmp_path: Path) -> None:
    for said in ranks(2, results_alone, str(tmp_path / "run")):
        assert "model.name was 'resnet20', now 'resnet56'" in said[0] and "optim.name was" in said[1]


def wrong_plan(run_dir: str) -> str:
    from dist_compress import speedup

    real = speedup.plan

    def off_by_one(*args: Any, **settings: Any) -> Any:
        plan = real(*args, **settings)
        for name, dims in plan.keep.items():
            width = args[0].get_parameter(name).shape[1] if 1 in dims else 0
            if 0 < len(dims.get(1, ())) < width:  # the inputs of a convolution
                dims[1] = (dims[1] + 1) % width
                return plan
        raise AssertionError("nothing was pruned")

    speedup.plan = off_by_one
    try:
        return refusal(run_dir)
    finally:
        speedup.plan = real


def test_a_wrong_plan_is_not_shipped(ranks: Any, tmp_path: Path) -> None:
    for text in ranks(2, wrong_plan, str(tmp_path / "run")):
        assert text.startswith("RuntimeError: masked and shrunk model differ by")
    assert not {"model.safetensors", "summary.json", "plan.json"} & contents(tmp_path / "run").keys()


def full_disk(run_dir: str) -> str:
    from dist_compress import comm
    from dist_compress.training import checkpoint

    save = checkpoint.save_tensors

    def failing(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise checkpoint.CheckpointException("save", {1: (OSError(28, "No space left on device"), None)})  # type: ignore

    state = {"a": torch.arange(8.0)}
    checkpoint.save(Path(run_dir), 1, state, {"phase": "train"}, keep=2)
    checkpoint.save_tensors = failing
    try:
        checkpoint.save(Path(run_dir), 2, state, {"phase": "train"}, keep=2)
    except Exception as error:
        assert comm.world_size() == 2
        return f"{type(error).__name__}: {error}"
    finally:
        checkpoint.save_tensors = save
    return "no error"


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(ranks: Any, tmp_path: Path) -> None:
    for text in ranks(2, full_disk, str(tmp_path)):
        assert text.startswith("UserError: run_dir=") and "checkpoint of step 2" in text and "No space left" in text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
