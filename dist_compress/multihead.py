"""nn.MultiheadAttention in the open: out_proj runs as the layer it is, and attention as functions that can be seen.

torch hands all its weights to one function, F.multi_head_attention_forward (or to one kernel, in evaluation), and never
calls out_proj. Here the same is computed step by step: [batch, L, E] is projected with in_proj_weight and in_proj_bias,
cut into heads, [batch, heads, L, E / heads], and goes through scaled_dot_product_attention; or, where the caller needs
the weights of attention, through matmul, softmax and matmul. With bias_k, bias_v or add_zero_attn it stays closed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


def opens(module: nn.Module) -> bool:
    """Whether `forward` can take the place of the module's own."""
    if not isinstance(module, nn.MultiheadAttention) or module.bias_k is not None or module.add_zero_attn:
        return False
    return parametrize.type_before_parametrizations(module).forward is nn.MultiheadAttention.forward


def forward(
    self: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None, need_weights: bool = True, attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """As nn.MultiheadAttention.forward. (`is_causal` says of `attn_mask` what it is, so it changes nothing.)"""
    if is_causal and attn_mask is None:
        raise RuntimeError("nn.MultiheadAttention: is_causal needs an attn_mask.")
    batched, same = query.dim() == 3, query is key and key is value
    query, key, value = (_batch_first(x, batched, self.batch_first) for x in (query, key, value))
    q, k, v = _projected(self, query, key, value, same)
    mask = _mask(attn_mask, key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None], q, k)
    dropout = self.dropout if self.training else 0.0
    weights = None
    if need_weights:
        scores = torch.matmul(q * math.sqrt(1 / q.size(-1)), k.transpose(-2, -1))
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        out = torch.matmul(weights, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = self.out_proj(out.transpose(1, 2).flatten(2))
    if weights is not None:
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights[0]
    if not batched:
        return out[0], weights
    return out if self.batch_first else out.transpose(0, 1), weights


def _batch_first(x: torch.Tensor, batched: bool, batch_first: bool) -> torch.Tensor:
    if not batched:
        return x[None]
    return x if batch_first else x.transpose(0, 1)


def _projected(
    self: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, same: bool
) -> list[torch.Tensor]:
    """Queries, keys and values by head: [batch, heads, L or S, E / heads]."""
    if same and self.in_proj_weight is not None:
        projected: Any = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
    else:
        packed = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = map(F.linear, (query, key, value), weights, biases)
    return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]


def _mask(
    attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor | None:
    """What is added to the scores, [batch or 1, heads or 1, L or 1, S]. `attn_mask`: [L, S] or [batch * heads, L, S];
    `key_padding_mask`: [batch, S]; bool (True: not seen) or added."""
    mask = None
    if attn_mask is not None:
        mask = _added(attn_mask, q.dtype)
        mask = mask[None, None] if mask.dim() == 2 else mask.view(q.size(0), q.size(1), q.size(2), k.size(2))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, q.dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
