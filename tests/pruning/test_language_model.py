"""Wanda and SparseGPT on a Llama of random weights, in a loop of one's own that hears tokens and does not train."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dist_compress import comm
from dist_compress.own_loop import attach

NUM_MICRO = 12


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:  # large enough to matter beside the residual stream
                p.mul_(6.0)
    return model


def tokens(micro: int) -> torch.Tensor:
    return torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(micro))


def pruned(method: str, granularity: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(weights of the layers after the end, logits of held-out tokens). On any number of ranks."""
    model = llama()
    entry = {"op_types": ["Linear"], "exclude_op_names": ["lm_head"], "granularity": granularity}
    keys = {} if granularity == "2:4" else {"sparse_ratio": 0.5}
    schedule = {"start": "1steps", "end": "1steps"}
    recipe = {"pruning": {"method": method, "config_list": [entry], "schedule": schedule, **keys}}
    each = NUM_MICRO // comm.world_size()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    c = attach(model, optimizer, recipe, (), {"input_ids": tokens(99)}, total_steps=1, micro_batches=each)
    for micro in range(each):
        ids = tokens(micro * comm.world_size() + comm.rank())
        c.loss(model(input_ids=ids, labels=ids).loss).backward()
    c.step()
    model, finished = c.finish()
    assert finished.difference < 1e-5 and all(row["given"] == 0.5 for row in finished.results["groups"])
    layers = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    with torch.no_grad():
        return layers, model(input_ids=tokens(100)).logits


@pytest.mark.parametrize(("method", "granularity"), [("wanda", "element"), ("sparsegpt", "2:4")])
def test_layers_of_a_language_model_at_any_number_of_ranks(ranks, method, granularity):
    layers, logits = ranks(1, pruned, method, granularity)[0]
    assert len(layers) == 2 * 7
    for name, weight in layers.items():
        zeros = weight == 0
        runs = zeros.view(-1, 4) if granularity == "2:4" else zeros
        assert bool((runs.sum(1) == runs.shape[1] // 2).all()), name
    for other, found in ranks(3, pruned, method, granularity):
        assert torch.equal(found, logits) and all(torch.equal(other[n], w) for n, w in layers.items())


def test_weights_that_make_up_for_others_keep_the_model_closer():
    with torch.no_grad():
        dense = llama()(input_ids=tokens(100)).logits
    away = {m: float((pruned(m, "2:4")[1] - dense).square().mean()) for m in ("wanda", "sparsegpt")}
    assert away["sparsegpt"] < 0.7 * away["wanda"]
