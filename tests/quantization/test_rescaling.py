"""Rescaling as a round of the calibration: equal bits on any number of ranks, collectives, refusals, its own check."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # also in the workers of the pool
from block_nets import LINEAR, Block, attached, micro, shown  # noqa: E402

from dist_compress import comm  # noqa: E402
from dist_compress.errors import UserError  # noqa: E402
from dist_compress.fingerprint import weights_fingerprint  # noqa: E402
from dist_compress.quantization import channels  # noqa: E402


def bits(method: str, num_micro: int) -> tuple[str, str, dict[str, int], list[str]]:
    model = Block()
    quantizer = attached(model, num_micro=num_micro, method=method, config_list=LINEAR)
    comm.calls.clear()
    shown(quantizer)
    calls = dict(comm.calls)
    quantizer.begin()
    return weights_fingerprint(model), quantizer.fingerprint(), calls, quantizer.said


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_equal_bits_at_any_number_of_ranks(ranks, method):
    for num_micro, sizes in ((2, (3,)), (5, (2, 3, 4))):  # of 2 micro-batches the third rank has none
        weights, scales, calls, _ = ranks(1, bits, method, num_micro)[0]
        assert weights != bits_without(num_micro)
        for n in sizes:
            for other_weights, other_scales, other_calls, _ in ranks(n, bits, method, num_micro):
                assert (other_weights, other_scales) == (weights, scales)
                assert other_calls == calls
    # failures of all ranks, scales of all folds; what was heard one by one, or all maxima
    heard = {"ordered_sum": 4, "all_gather": 4} if method == "awq" else {}
    assert calls == {"gather_object": 1, "all_reduce": 1 + (method == "smoothquant"), **heard}


def bits_without(num_micro: int) -> str:
    return weights_fingerprint(shown(attached(Block(), num_micro=num_micro, method="round_to_nearest")).context.model)


def test_layers_without_a_fold_are_named():
    assert not bits("awq", 2)[3]
    model = Block()
    model.o.weight = model.q.weight  # tied: neither the columns of q and o, nor norm1
    quantizer = shown(attached(model, method="awq", config_list=LINEAR))
    assert quantizer.notes() == ["awq: no exact fold into what comes before, so not rescaled: q, k, v, o"]


def test_nothing_goes_on_listening_where_nothing_can_be_rescaled():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    quantizer = attached(model, method="awq", config_list=LINEAR)
    hooks = len(model._forward_pre_hooks), len(model[0]._forward_pre_hooks)
    assert not list(quantizer.rounds())
    assert (len(model._forward_pre_hooks), len(model[0]._forward_pre_hooks)) == hooks


def test_what_only_some_readers_are_quantized_by():
    """The others are rescaled all the same, or the model would change."""
    model, before = Block(), Block()
    entry = {"op_names": ["k"], "target_names": ["weight"]}
    quantizer = shown(attached(model, method="smoothquant", config_list=[entry]))
    assert list(quantizer.parameters) == ["k.weight"]
    assert not torch.equal(model.q.weight, before.q.weight) and torch.equal(model.o.weight, before.o.weight)
    x = micro(5, 5)
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)


def test_inputs_can_be_smoothed_for_weights_of_another_method():
    x, lost = micro(5, 5), {}
    for method in ("smoothquant", "ptq"):
        model = Block()
        entry = {"op_types": ["Linear"], "target_settings": {"_input_0": {}, "weight": {"method": "gptq"}}}
        quantizer = shown(attached(model, method=method, config_list=[entry]))
        assert torch.equal(model.norm1.weight, Block().norm1.weight) == (method == "ptq")
        solved = model.down.weight.detach().clone()
        quantizer.begin()
        quantizer.context.projection.project()
        assert torch.equal(model.down.weight, solved) and not torch.equal(solved, Block().down.weight)
        lost[method] = float((model(x) - Block()(x)).detach().norm())
    assert lost["smoothquant"] < 0.9 * lost["ptq"]


def test_options_of_one_fold_must_agree():
    entries = [*LINEAR, {"op_names": ["q"], "options": {"alpha": 0.7}}]
    with pytest.raises(UserError, match="q and k read the same channels, which smoothquant rescales for both"):
        shown(attached(Block(), method="smoothquant", config_list=entries))


def not_finite(method: str) -> str:
    def inputs(step: int, j: int) -> torch.Tensor:
        x = micro(step, j)
        return x / 0 if j == 1 else x

    try:
        shown(attached(Block(), method=method, config_list=LINEAR), inputs)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_inputs_that_are_not_finite_stop_every_rank(ranks, method):
    said = ranks(2, not_finite, method)
    assert said[0] == said[1] and f"q: {method} heard inputs that are NaN or infinite" in said[0]


def test_a_wrong_fold_is_caught_before_anything_is_quantized(monkeypatch):
    found = channels.find

    def wrong(sites):
        graph = found(sites)
        first = graph.folds[0]
        return dataclasses.replace(graph, folds=(dataclasses.replace(first, readers=first.readers[1:]),))

    monkeypatch.setattr(channels, "find", wrong)
    with pytest.raises(RuntimeError, match="model with rescaled channels differs from what it was"):
        shown(attached(Block(), method="smoothquant", config_list=LINEAR))


def test_ranges_of_activations_are_those_of_the_rescaled_model():
    model = Block()
    quantizer = shown(attached(model, method="smoothquant", config_list=[{"op_types": ["Linear"]}]))
    highest = max(float(model.norm1(micro(s, j)).detach().max()) for s in range(2) for j in range(4))
    assert quantizer.activations["q._input_0"].observer.high.item() == pytest.approx(highest, rel=1e-6)
    assert highest < max(float(Block().norm1(micro(s, j)).detach().max()) for s in range(2) for j in range(4)) / 2
