"""What masks survive: drifted replicas, flipped bits, ranks that see another model, a decision that is cut off, another
accumulation; and that the comparison of masks would see what must not be done, such as roots before the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning_nets import NUM_MICRO, Net, attach, config, member, train
from sharded_nets import shard
from torch import nn

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.fingerprint import weights_fingerprint
from dist_compress.pruning.gates import Gates
from dist_compress.pruning.inputs import Inputs
from dist_compress.pruning.outputs import Outputs
from dist_compress.target import Coupling, UnitGroup

SCHEDULE = {"name": "linear", "start": "1steps", "end": "3steps", "num_decisions": 2}
ENTRIES = [
    {"op_names": ["stem", "b"]},
    {"op_names": ["a"], "granularity": [2, -1, -1, -1], "global_group_id": 1},
    {"op_names": ["free", "head"], "granularity": "element", "method": "l2_norm"},
]


def decided(kind: str, spoil: str, **keys: Any) -> tuple[list[str], list[str], str]:
    """Marks of the masks that act after a first decision and after another that was spoilt, and what was said."""
    pruner, model, projection = attach(config(ENTRIES, schedule=SCHEDULE, **keys), Net(), total_steps=4)
    projection.layout = shard(model, kind)
    pruner.decide(1)
    projection.project()
    projection.restore()
    before = marks(pruner, projection)
    said = ""
    try:
        SPOILT[spoil](pruner, projection)
        pruner.decide(3)
    except (RuntimeError, KeyboardInterrupt) as error:
        said = str(error)
    return before, marks(pruner, projection), said


def marks(pruner: Any, projection: Any) -> list[str]:
    """What acts and what a checkpoint would hold."""
    acting = {name: int((~mask).sum()) for name, mask in projection.masks().items()}
    state = pruner.state_dict()
    bits = {name: int(b.sum()) for name, b in state["elements"].items()}
    return [repr(acting), repr(bits), repr(state["units"].tolist()), repr(pruner.history)]


def flip(pruner: Any, projection: Any) -> None:
    """One bit of a mask that acts on the last rank turns over."""
    if comm.rank() == comm.world_size() - 1:
        bits = projection._functions["free.weight"]["mask"].bits.view(-1)
        bits[0] = ~bits[0]


def cut_off(pruner: Any, projection: Any) -> None:
    """The program is stopped when all is decided and nothing is put on."""

    def stop(*args: Any, **keys: Any) -> Any:
        raise KeyboardInterrupt("stopped")

    pruner._put_on = stop


def disagree(pruner: Any, projection: Any) -> None:
    """The last rank's new mask has another bit than it was told."""
    tell = pruner.elements.placed.tell

    def wrong(parts: Any) -> None:
        tell(parts)
        if comm.rank() == comm.world_size() - 1:
            bits = pruner.elements.placed.bits["head.weight"]
            bits[0] = ~bits[0]

    pruner.elements.placed.tell = wrong


SPOILT = {"nothing": lambda *_: None, "flip": flip, "cut_off": cut_off, "disagree": disagree}


@pytest.mark.parametrize("kind", ["whole", "fsdp", "flat"])
def test_a_flipped_bit_of_a_mask_stops_all_ranks_at_the_next_decision(ranks, kind):
    for size in (2, 3):
        for before, after, said in ranks(size, decided, kind, "nothing"):
            assert before != after and said == ""
        for _, _, said in ranks(size, decided, kind, "flip"):
            if kind == "whole":
                assert "disagree on the pruning masks before the decision at step 3" in said
                assert f"on rank {size - 1}" in said
            else:
                assert "masks changed before step 3" in said and "step 1" in said


def test_ranks_that_disagree_keep_the_masks_of_before(ranks):
    for before, after, said in ranks(3, decided, "whole", "disagree"):
        assert "disagree on pruning masks at step 3" in said and before[3] == after[3]
        assert before == after


@pytest.mark.parametrize("kind", ["whole", "fsdp"])
def test_a_decision_that_is_cut_off_before_it_acts_leaves_the_masks_of_before(ranks, kind):
    for before, after, said in ranks(2, decided, kind, "cut_off"):
        assert said == "stopped" and before == after


def drifted(ulps: int) -> tuple[list[Any], str]:
    """The weights of rank 1 are an ulp off, as a replica may drift; in the end weights are compared, as in a run."""
    pruner, model, _ = attach(config(ENTRIES, schedule=SCHEDULE), total_steps=4)
    if comm.rank() == 1:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)) if ulps else p)
    pruner.decide(1)
    pruner.decide(3)
    try:
        comm.check_equal("fingerprint of the weights", weights_fingerprint(model), 3)
    except RuntimeError as error:
        return pruner.history, str(error)
    return pruner.history, ""


def test_replicas_that_drifted_agree_on_masks_and_are_reported(ranks):
    for history, said in (found := ranks(3, drifted, 1)):
        assert history == found[0][0]
        assert "disagree on fingerprint of the weights" in said and "on rank 1" in said
    assert all(said == "" for _, said in ranks(3, drifted, 0))


class Swapped(Net):
    """The same parameters, but on rank 1 those of two layers in the other order."""

    def __init__(self) -> None:
        super().__init__()
        if comm.rank() == 1:
            free = self._modules.pop("free")
            self._modules["free"] = free


def in_another_order(what: str) -> tuple[str, dict[str, int]]:
    model = Swapped() if what == "model" else Net()
    names = ["a", "free"] if what == "model" or comm.rank() == 0 else ["free", "stem"]
    entries = [{"op_names": [name], "granularity": "element"} for name in names]
    comm.calls.clear()
    try:
        attach(config(entries), model)
    except UserError as error:
        return str(error), dict(comm.calls)
    return "", dict(comm.calls)


def test_ranks_that_see_another_order_are_refused_before_any_decision(ranks):
    for what, saying in (("model", ("parameter free.weight", "parameter head.weight")), ("targets", ("target a",))):
        for said, calls in ranks(2, in_another_order, what):
            assert all(text in said for text in saying) and "on rank 1" in said and "on rank 0" in said
            assert calls == {"gather_object": 2}
    model = ranks(1, in_another_order, "model")[0]
    assert model == ("", {"gather_object": 1})


METHODS = [
    {"op_names": ["stem", "b"], "method": "taylor"},
    {"op_names": ["a"], "method": "mean_activation"},
    {"op_names": ["free"], "granularity": "element", "method": "wanda"},
    {"op_names": ["head"], "granularity": "element", "method": "movement"},
]


def accumulated() -> list[Any]:
    pruner, model, projection = attach(config(METHODS, schedule=SCHEDULE), total_steps=4)
    train(pruner, model, projection, range(4))
    return pruner.history


def test_accumulation_on_one_rank_equals_as_many_ranks(ranks):
    one = ranks(1, accumulated)[0]
    assert len({mark for *_, mark in one}) > 1
    for size in (2, 3, 4):
        assert all(found == one for found in ranks(size, accumulated))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 256), nn.Linear(256, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 32] -> [B, 5]
        return self.down(self.up(x).relu())


UNITS = (member("up.weight", 256), member("up.bias", 256), member("down.weight", 256, "consumer", 1))
WRONG = {  # what a rank may not do to its own sum before it is reduced
    "movement": ("abs", Gates, {"op_names": ["up"], "granularity": "out_channel", "method": "movement"}),
    "taylor": ("root", Gates, {"op_names": ["up"], "method": "taylor"}),
    "mean_activation": ("root", Outputs, {"op_names": ["up"], "method": "mean_activation"}),
    "wanda": ("root", Inputs, {"op_names": ["down"], "granularity": "element", "method": "wanda"}),
}


def reduced(method: str, spoil: bool) -> list[torch.Tensor]:
    """The bits of the masks after one decision; `spoil`: ranks drop signs or take roots before the sum."""
    how, kind, entry = WRONG[method]
    schedule = {"name": "one_shot", "start": "1steps", "end": "1steps"}
    coupling = Coupling((UnitGroup("up", 256, UNITS),))
    pruner, model, _ = attach(config([{**entry}], schedule=schedule), Wide(), coupling, 4, torch.zeros(2, 32))
    for micro in range(comm.rank(), NUM_MICRO, comm.world_size()):
        generator = torch.Generator().manual_seed(micro)
        x = torch.randn(4, 32, generator=generator) + 2 * torch.randn(32, generator=generator)
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
        pruner.after_backward(0, micro)
    assert pruner.listeners
    if spoil:
        for listener in pruner.listeners.values():
            assert isinstance(listener, kind)
            slots = listener.statistic._slots
            total = slots.sum(0)
            slots.zero_()
            slots[0] = total.abs().sqrt() if how == "root" else total.abs()
    pruner.decide(1)
    return [mask.flatten() for _, mask in sorted(pruner.masks().items())]


@pytest.mark.parametrize("method", WRONG)
def test_negative_control_what_is_not_linear_before_the_sum_changes_the_mask(ranks, method):
    right = torch.cat(ranks(1, reduced, method, False)[0])
    assert 0 < int(right.sum()) < len(right)  # of 256 channels or 1280 weights
    wrong = []
    for size in (2, 3):
        assert all(torch.equal(torch.cat(found), right) for found in ranks(size, reduced, method, False))
        wrong.append(int((torch.cat(ranks(size, reduced, method, True)[0]) != right).sum()))
    assert all(wrong), wrong
