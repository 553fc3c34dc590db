"""nn.MultiheadAttention that knows the sizes of its heads by itself, so that heads can go while the width stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SlimAttention(nn.MultiheadAttention):
    """Multi-head attention of `num_heads` heads whose total width is not `embed_dim`. Never built, only exchanged for.

    Parameters keep their names; rows of the in-projection are (q, k, v) x heads x head size, as columns of the
    out-projection are heads x head size of v. Fused kernels of nn.TransformerEncoder are not taken.
    """

    qk_head_dim: int
    v_head_dim: int
    scale: float  # of the head size before anything was removed

    @classmethod
    def exchange(cls, module: nn.Module, settings: dict[str, int | float | bool]) -> None:
        """Make an `nn.MultiheadAttention` one of this class, in place."""
        module.__class__ = cls
        # The last is what the fast paths of torch ask before they assume the usual size of a head.
        vars(module).update(settings, head_dim=settings["qk_head_dim"], _qkv_same_embed_dim=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: query [L, B, E] or [B, L, E] or [L, E]; returns (output, weights or None)."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched, self_attention = query.dim() == 3, query is key and key is value
        inputs = [query] if self_attention else [query, key, value]
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = self._project(inputs)
        mask = self._merge(attn_mask, key_padding_mask, q)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.size(0), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.size(0), 1, -1)], 1)
            mask = None if mask is None else F.pad(mask, (0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v, mask = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), None if mask is None else F.pad(mask, (0, 1))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, inputs: list[Tensor]) -> list[Tensor]:
        """q, k, v [B, tokens, heads x head size] of one input, or of three."""
        rows = [self.num_heads * n for n in (self.qk_head_dim, self.qk_head_dim, self.v_head_dim)]
        fused, bias = self.in_proj_weight, self.in_proj_bias
        if fused is not None and len(inputs) == 1:
            return list(F.linear(inputs[0], fused, bias).split(rows, -1))
        weights = fused.split(rows) if fused is not None else self._separate()
        biases = [None] * 3 if bias is None else bias.split(rows)
        inputs = inputs * 3 if len(inputs) == 1 else inputs
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _separate(self) -> list[Tensor]:
        return [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]

    def _merge(self, mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores, broadcastable to [B, heads, L, S]."""
        mask = None if mask is None else _additive(mask, like)
        if mask is not None:
            mask = mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask[None, None]
        if padding is None:
            return mask
        padding = _additive(padding, like)[:, None, None]
        return padding if mask is None else mask + padding


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def attention_settings(module: nn.MultiheadAttention, kept: dict[str, Tensor]) -> dict[str, int | float | bool]:
    """What a module whose parameters keep `kept` becomes: {"rows" of the in-projection, "heads": columns of the
    out-projection, "embed", "key", "value": the inputs}: int64 indices.

    Raises ValueError when what is kept is not the same coordinates of whole heads.
    """
    grid = torch.zeros(module.num_heads * module.head_dim * 3, dtype=torch.bool)
    grid[kept["rows"]] = True
    q, k, v = grid.view(3, module.num_heads, module.head_dim)
    out = torch.zeros(module.num_heads * module.head_dim, dtype=torch.bool)
    out[kept["heads"]] = True
    heads = q.any(1)
    boxes = all(torch.equal(x, heads[:, None] & x.any(0)) for x in (q, k, v))
    if not (boxes and torch.equal(q, k) and torch.equal(v.flatten(), out)):
        raise ValueError("heads of different sizes")
    return {
        "num_heads": int(heads.sum()),
        "qk_head_dim": int(q.any(0).sum()),
        "v_head_dim": int(v.any(0).sum()),
        "scale": module.head_dim**-0.5,
        "embed_dim": len(kept["embed"]),
        "kdim": len(kept["key"]),
        "vdim": len(kept["value"]),
    }
