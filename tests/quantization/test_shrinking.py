"""What quantizers keep when a model is shrunk: hand-computed slices of scales, observers and moments."""

from __future__ import annotations

import pytest
import torch
from nets import EXAMPLE, attached, calibrated, net
from torch import nn

from dist_compress.config import Config, QuantizationConfig
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.projection import Masked, Projection
from dist_compress.quantization import Quantizer
from dist_compress.quantization.dtypes import DTYPES
from dist_compress.quantization.fake_quant import Spec
from dist_compress.quantization.granularity import PerGroup, block_numbers, carried, mixed, rows
from dist_compress.quantization.histogram import BINS, Histogram
from dist_compress.quantization.methods.lsq import Lsq, Options
from dist_compress.quantization.observer import MovingAverage
from dist_compress.speedup import apply, apply_to_state, coupling, plan
from dist_compress.target import Coupling


def test_blocks_that_stay_whole_keep_their_values_and_others_have_a_mean():
    numbers = block_numbers((2, 4), PerGroup(2))
    assert numbers.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    members = rows(numbers[:, [1, 2]], PerGroup(2)).long()  # columns 0 and 3 go
    assert members.tolist() == [[0, 1], [2, 3]] and mixed(members).tolist() == [True, True]
    values = torch.tensor([[1.0, 3.0], [5.0, 6.0]])
    assert carried(values, members).tolist() == [2.0, 5.5]
    members = rows(numbers[:, [2, 3]], PerGroup(2)).long()
    assert carried(values, members).tolist() == [3.0, 6.0]
    assert carried(values.int(), rows(numbers[:, [1, 2]], PerGroup(2)).long()).tolist() == [1, 5]


def test_a_learned_scale_is_sliced_and_its_gain_is_that_of_what_is_left():
    spec = Spec(DTYPES["int4"], "symmetric", PerGroup(2), False, False)
    quantizer = Lsq(spec, (2, 4), Options())
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor([[1.0, 3.0], [5.0, 6.0]]))
    members = rows(block_numbers((2, 4), PerGroup(2))[1:, [2, 3]], PerGroup(2)).long()
    quantizer.resize((1, 2), members)
    assert isinstance(quantizer.scale, nn.Parameter) and quantizer.scale.tolist() == [[6.0]]
    assert quantizer.zero_point.tolist() == [[0]] and quantizer.gain == 1 / (2 * 7) ** 0.5


def test_the_first_scale_is_the_mean_of_what_is_kept():
    spec = Spec(DTYPES["int4"], "symmetric", PerGroup(4), False, False)
    quantizer = Lsq(spec, (1, 4), Options())
    quantizer.fit(torch.tensor([[1.0, 0.0, -3.0, 0.0]]))  # two are masked
    torch.testing.assert_close(quantizer.scale.flatten(), torch.tensor([2 * 2 / 7**0.5]))


def test_observers_follow():
    members = torch.tensor([[1, 1], [1, 2]])
    average = MovingAverage(PerGroup(2), (1, 6))
    average.low, average.high = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([4.0, 5.0, 6.0])
    average.resize((1, 2), members)
    assert average.range()[0].tolist() == [[-2.0, -3.0]] and average.range()[1].tolist() == [[5.0, 6.0]]
    histogram = Histogram(PerGroup(2), (1, 6))
    histogram.fold(histogram.measure(torch.tensor([[1.0, 1.0, 0.5, -0.5, 3.0, 3.0]])))
    histogram.commit(histogram.maxima(), histogram.sums(histogram.maxima()))
    histogram.resize((1, 2), members)
    assert histogram.exponent.tolist() == [0, 2] and histogram.bins.sum(1).tolist() == [2, 4]
    assert histogram.bins[0].nonzero()[:, 0].tolist() == [BINS // 2, BINS + BINS // 2]  # -0.5 and 0.5 of [-1, 1)
    assert histogram.bins[1, BINS + 3 * BINS // 4] == 2  # 3 of [-4, 4)


ENTRIES = [
    {"op_names": ["conv1", "linear"], "target_names": ["weight", "_input_0"]},
    {"op_names": ["relu"], "target_settings": {"_output_0": {"granularity": "per_channel"}}},
]


def shrunk(method: str, kept: list[int]) -> tuple[Quantizer, dict[str, torch.Tensor]]:
    """`net` without some channels of conv1 and of what is coupled to it, quantized; and what its scales were."""
    model = net()
    model.conv2 = nn.Conv2d(6, 6, 1)  # coupled by the addition
    quantizer = calibrated(model, method=method, config_list=ENTRIES)
    keep = torch.zeros(6, dtype=torch.bool)
    keep[kept] = True
    projection = quantizer.context.projection
    with projection.lifted():
        for layer, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            projection.add(f"{layer}.weight", "mask", Masked(keep[:, None, None, None]))
            for name in (f"{layer}.bias", f"{norm}.weight", f"{norm}.bias"):
                if name != "conv1.bias":
                    projection.add(name, "mask", Masked(keep))
    projection.project()
    before = {path: q.scale.detach().clone() for path, q in quantizer._all().items()}
    quantizer.detach()
    projection.finish()
    made = plan(model.eval(), (EXAMPLE,))
    apply(model, made)
    quantizer.rebase(lambda tensors: apply_to_state(made, tensors))
    quantizer.reattach()
    return quantizer, before


@pytest.mark.parametrize("method", ["qat", "lsq"])
def test_scales_follow_the_plan(method):
    kept = [0, 2, 5]
    quantizer, before = shrunk(method, kept)
    after = {path: q.scale for path, q in quantizer._all().items()}
    assert torch.equal(after["conv1.weight"], before["conv1.weight"][kept])
    assert torch.equal(after["relu._output_0"], before["relu._output_0"][:, kept])  # found through its mark
    assert torch.equal(after["linear._input_0"], before["linear._input_0"])
    assert quantizer.difference is not None and quantizer.difference < 1e-12
    model = quantizer.context.model
    assert model.conv1.out_channels == 3 and not any("mark" in name for name, _ in model.named_buffers())
    if method == "lsq":
        moment = torch.arange(6.0).view(6, 1, 1, 1)
        name = "conv1.quantizer_weight.scale"
        assert quantizer.follow({name: moment, "conv1.weight": moment})[name].flatten().tolist() == [0.0, 2.0, 5.0]
        assert quantizer.parameters["linear.weight"].gain == 1 / (3 * 127) ** 0.5  # 3 features are left
    state = quantizer.context.model.state_dict()
    quantizer.fold()
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_groups_that_a_shrink_may_cut_need_round_to():
    model = net()
    entry = {"op_names": ["linear"], "target_settings": {"weight": {"granularity": "per_group(3)"}}}
    config = Config(quantization=QuantizationConfig(method="qat", config_list=[entry]))
    found = coupling(model, (EXAMPLE,))
    example = ((EXAMPLE,), {})
    with pytest.raises(UserError, match=r"linear.weight: a scale for each 3 entries of dim 1.*speedup.round_to=3"):
        Quantizer(config).attach(Context(config, model, Projection(model), found, 1, 1, 1.0, example))
    config.speedup.round_to = 6
    Quantizer(config).attach(Context(config, model, Projection(model), found, 1, 1, 1.0, example))
    assert attached(net(), method="qat", config_list=[entry]).context.coupling == Coupling()  # nothing is pruned


def test_a_norm_that_is_masked_is_folded_with_its_mask():
    """gamma of a channel is masked, its weights are not: nothing of it is left, and no other channel sees it."""
    model, other = net(), net()
    for each in (model, other):
        quantizer = attached(each, method="qat", config_list=[{"op_names": ["conv1"], "target_names": ["weight"]}])
        quantizer.context.projection.restore()
        keep = torch.tensor([True, True, False, True, True, True])
        quantizer.context.projection.add("bn1.weight", "mask", Masked(keep))
        if each is other:
            with torch.no_grad():
                each.conv1.weight[2] *= 100
        quantizer.begin()
    assert not model.conv1.weight[2].any() and torch.equal(model.conv1.weight, other.conv1.weight)
