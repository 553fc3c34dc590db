"""Targets and links by name, comparisons, what is refused; runs with equal bits that go on through the shrink."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from distillation_nets import attach, hidden, hidden_series, images, killed_run, losses, whole_run
from torch.nn import functional as F

from dist_compress.distillation.layerwise import LOST, matching
from dist_compress.errors import UserError


def l1(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    return temperature * (student - teacher).abs().flatten(1).sum(1)


@pytest.fixture
def own_comparison(monkeypatch: pytest.MonkeyPatch) -> str:
    """The dotted path of `l1`."""
    import sys
    import types

    module = types.ModuleType("my_comparisons")
    module.l1 = l1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_comparisons", module)
    return "my_comparisons.l1"


def one(entry: dict[str, Any], **keys: Any) -> tuple[float, Any, Any]:
    distiller, student, teacher = attach([entry], **{"method": "fitnets", **keys})
    [loss] = losses(distiller, student).values()
    return float(loss.detach()), student, teacher


def test_apply_methods(own_comparison):
    entry = {"op_names": ["head"]}
    loss, student, teacher = one(entry)
    own, theirs = hidden(student, "head"), hidden(teacher, "head")
    assert loss == pytest.approx(float((own - theirs).square().mean(1).sum()), rel=1e-5)
    loss, *_ = one({**entry, "apply_method": "kl"}, temperature=2.0)
    right = 4 * F.kl_div((own / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="sum")
    assert loss == pytest.approx(float(right), rel=1e-4)
    loss, *_ = one({**entry, "apply_method": own_comparison}, temperature=2.0)
    assert loss == pytest.approx(2 * float((own - theirs).abs().sum()), rel=1e-5)


def test_kl_of_images_is_over_channels():
    loss, student, teacher = one({"op_names": ["layer2"], "apply_method": "kl"})
    own, theirs = (hidden(m, "layer2").movedim(1, -1) for m in (student, teacher))
    right = F.kl_div(own.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1).mean((1, 2)).sum()
    assert loss == pytest.approx(float(right), rel=1e-4)


@pytest.mark.parametrize("target", ["_input_0", "_output_logits", "_output_both.1"])
def test_any_tensor_of_a_module(target):
    """Inputs, and what lies in a dataclass or a tuple in it."""
    loss, student, teacher = one({"op_names": ["pair"], "target_names": [target]})
    factor = 9 if target == "_output_both.1" else 1
    states = []
    for model in (student, teacher):
        handle = model.pair.register_forward_pre_hook(lambda m, args: states.append(args[0].clone()))
        model(images())
        handle.remove()
    right = factor * (states[0] - states[1]).square().mean(1).sum()
    assert loss == pytest.approx(float(right), rel=1e-4)


def test_a_link_may_name_another_target():
    loss, student, teacher = one({"op_names": ["layer2"], "link": "extra._input_0"})
    right = (hidden(student, "layer2") - F.relu(hidden(teacher, "layer2"))).square().mean((1, 2, 3)).sum()
    assert loss == pytest.approx(float(right), rel=1e-5)


def test_what_follows_in_place_does_not_show():
    """relu works in place on what bn1 puts out; the state before it is what is compared."""
    loss, student, teacher = one({"op_names": ["bn1"]}, method="adaptive_1d_layerwise")
    assert float(hidden(student, "bn1").min()) < 0
    assert loss > 0


def test_images_of_two_sizes_meet_at_the_smaller():
    distiller, student, teacher = attach([{"op_names": ["layer2"], "link": "layer1"}], method="fitnets")
    [loss] = losses(distiller, student).values()
    weight = distiller.translators.weight(0)[:, :, None, None]
    right = F.conv2d(hidden(student, "layer2"), weight) - F.adaptive_avg_pool2d(hidden(teacher, "layer1"), 4)
    assert float(loss) == pytest.approx(float(right.square().mean((1, 2, 3)).sum()), rel=1e-5)


def test_evaluation_in_between_does_not_disturb():
    distiller, student, _ = attach([{"op_names": ["layer2"]}], method="fitnets")
    output = student(images())
    with torch.no_grad():
        student(images(3))
    batch = {"inputs": images(), "targets": torch.zeros(8, dtype=torch.int64)}
    [loss] = distiller.loss(0, batch, output).values()
    assert loss.requires_grad and loss.isfinite()


@pytest.mark.parametrize(
    ("entries", "keys", "said"),
    [
        (
            [{"op_names": ["layer2"], "link": "layer9"}],
            {},
            "link='layer9': the teacher has no module 'layer9'. Close: ",
        ),
        ([{"op_names": ["layer2"], "link": "head._output_3"}], {}, "link='head._output_3': head has no one _output_3"),
        ([{"op_names": ["layer2"], "link": "head"}], {}, "no translation joins them"),
        ([{"op_names": ["layer2"], "link": ["layer2", "extra"]}], {}, "fitnets takes 1"),
        ([{"op_names": ["nothing"]}], {}, "nothing"),
        ([{"op_names": ["layer2"], "lambda": -1}], {}, "config_list[0].lambda=-1 must be a number, at least 0"),
        ([{"op_names": ["layer2"], "lamda": 1}], {}, "config_list[0].lamda: no such key. Did you mean lambda?"),
        ([{"op_names": ["layer2"], "target_names": ["weight"]}], {}, "only activations are compared"),
        ([{"op_names": ["layer2"], "apply_method": "cosine"}], {}, "apply_method='cosine': no such comparison"),
        ([{"op_names": ["layer2"], "method": "logits"}], {}, "which compares no hidden states. Set method: fitnets"),
        ([{"op_names": ["layer2"]}], {"method": "logits"}, "which compares no hidden states. Set method: fitnets"),
        ([], {"method": "fitnets"}, "compares hidden states: name them in distillation.config_list"),
        ([{"op_names": ["layer2"], "options": {"x": 1}}], {}, "options.x: no such key"),
    ],
)
def test_what_is_refused(entries, keys, said):
    with pytest.raises(UserError) as caught:
        attach(entries, **{"method": "fitnets", **keys})
    assert said in str(caught.value), caught.value


MINE = """
from dataclasses import dataclass
from dist_compress.distillation.layerwise import LayerTerm

@dataclass
class Options:
    factor: float = 1.0

class Mine(LayerTerm):
    def compare(self, student, teacher, moment):
        return self.options.factor * (student - teacher).abs().flatten(1).mean(1)
"""


def test_a_method_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    entry = {"op_names": ["head"], "method": "my_package.mine", "options": {"factor": 2.0}}
    distiller, student, teacher = attach([entry])
    [(name, loss)] = losses(distiller, student).items()
    right = 2 * (hidden(student, "head") - hidden(teacher, "head")).abs().mean(1).sum()
    assert name == "mine/head._output_0_loss" and float(loss.detach()) == pytest.approx(float(right.detach()), rel=1e-5)


def test_matching_channels():
    dense = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([0, 2, 5])
    assert matching(dense, dense[:, kept]).tolist() == [0, 2, 5]  # type: ignore[union-attr]
    assert matching(dense, dense[:, [2, 0]]) is None  # not in order
    assert matching(dense, 2 * dense[:, kept]) is None
    assert matching(dense, torch.zeros(2, 6, 3, 3)).tolist() == list(range(6))  # type: ignore[union-attr]


ENTRIES = (
    "distillation.config_list=[{op_names: [layer1], method: fitnets, link: layer2},"
    "{op_names: [bn1], method: fitnets, lambda: 0.5},{op_names: [layer2], method: attention_transfer},"
    "{op_names: [head], method: dynamic_layerwise, link: [head, wide]}]"
)
PRUNED = [
    ENTRIES,
    "distillation.method=logits",
    "pruning.method=l1_norm",
    "pruning.sparse_ratio=0.5",
    "pruning.config_list=[{op_names: [layer1]}]",
    "pruning.schedule.end=5steps",
]


@pytest.fixture(scope="module")
def single(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, whole_run, str(tmp_path_factory.mktemp("one")), *PRUNED)[0]


def test_every_loss_is_logged_before_and_after_the_shrink(single):
    series = hidden_series(single)
    names = {"logits", "fitnets/layer1._output_0", "fitnets/bn1._output_0", "attention_transfer/layer2._output_0"}
    names |= {"dynamic_layerwise/head._output_0", "task"}
    assert len(series) == 10 and single["params/after"] < single["params/before"]
    for line in series:
        assert set(line) == {f"train/{name}_loss" for name in names} and all(value > 0 for value in line.values())


@pytest.mark.parametrize("n", [2, 3, 4])
def test_equal_bits_at_any_number_of_ranks(ranks, tmp_path, single, n):
    summary = ranks(n, whole_run, str(tmp_path), *PRUNED)[0]
    for name in ("fingerprint/weights", "fingerprint/plan", "accuracy/after"):
        assert summary[name] == single[name], name
    assert hidden_series(summary) == hidden_series(single)


@pytest.mark.parametrize(("step", "size", "then"), [(3, 2, 1), (7, 1, 2)])
def test_a_killed_run_resumes_to_the_same_bits(ranks, tmp_path, single, step, size, then):
    """Before and after the shrink: maps, their moments and the channels that are left come back."""
    ranks(size, killed_run, str(tmp_path), step, *PRUNED, "checkpoint.every_steps=2")
    summary = ranks(then, whole_run, str(tmp_path), *PRUNED, "checkpoint.every_steps=2")[0]
    assert summary["fingerprint/weights"] == single["fingerprint/weights"]
    assert hidden_series(summary)[-1] == hidden_series(single)[-1]


def test_plain_sums_of_gradients_train_the_same(ranks, tmp_path, single):
    """Behind DistributedDataParallel the hooks still see; the maps' gradients are summed all the same."""
    series = hidden_series(ranks(2, whole_run, str(tmp_path), *PRUNED, "train.exact=false")[0])
    for line, right in zip(series[:5], hidden_series(single), strict=False):
        assert line == pytest.approx(right, rel=1e-3)


def test_a_target_that_the_shrink_lost_is_told(caplog):
    distiller, student, _ = attach([{"op_names": ["layer2"]}], method="fitnets")
    distiller.layers[0].kept = LOST
    with caplog.at_level(logging.WARNING):
        [loss], _ = (losses(distiller, student).values() for _ in range(2))
    assert float(loss) == 0 and caplog.text.count("left no trace of layer2._output_0") == 1
