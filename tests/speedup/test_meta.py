"""Models on the meta device are captured, coupled and planned from masks alone, as the real ones are."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dist_compress import speedup
from dist_compress.errors import UserError

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
KWARGS = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long), "use_cache": False}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)).eval()


def half(model, coupling):
    """Masks of the first half of each group's units."""
    masks = {}
    for group in coupling.groups:
        for member in group.members if not group.blocked else ():
            if member.role != "consumer":
                shape = model.get_parameter(member.fqn).shape
                mask = torch.ones(shape[member.dim], dtype=torch.bool)
                mask[member.index[: group.num_units // 2].flatten()] = False
                masks[member.fqn] = mask.view([-1 if d == member.dim else 1 for d in range(len(shape))])
    return masks


def test_the_plan_of_a_meta_model_is_the_plan_of_the_real_one():
    real = llama()
    with torch.device("meta"):
        meta = llama()
    coupled = [speedup.coupling(m, (), KWARGS) for m in (real, meta)]
    assert [g.name for g in coupled[0].groups] == [g.name for g in coupled[1].groups]
    assert [g.blocked for g in coupled[0].groups] == [g.blocked for g in coupled[1].groups]
    masks = half(real, coupled[0])
    plans = [speedup.plan(m, (), KWARGS, masks=masks) for m in (real, meta)]
    assert plans[0].fingerprint() == plans[1].fingerprint()
    assert "model.layers.1.mlp.down_proj.weight" in plans[0].keep and not plans[1].blocked
    small = speedup.apply(meta, plans[1])
    assert small.model.layers[0].mlp.up_proj.weight.shape == (24, 32)


def test_index_constants_are_computed_and_a_leak_is_kept():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            order = torch.arange(5, -1, -1, device=x.device)
            assert bool((order[:2] == 5).any()), "read by python"
            return self.c(self.b(self.a(x).relu()[:, order]).sigmoid())

    def masks(name):
        mask = torch.tensor([False, True, True, False, True, True])
        return {f"{name}.weight": mask[:, None], f"{name}.bias": mask}

    real = Net()
    with torch.device("meta"):
        meta = Net()
    x = (torch.randn(1, 4),)
    reasons = [{b.reason for b in speedup.plan(m, x, masks=masks("a")).blocked} for m in (real, meta)]
    assert reasons[0] == reasons[1] and "index" in reasons[0].pop()
    plan = speedup.plan(meta, x, masks=masks("b"))
    assert not plan.keep and "cannot fold" in plan.blocked[0].reason


def test_weights_without_values_need_masks():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="masks"):
        speedup.plan(model, (torch.randn(1, 2),))
