"""Hugging Face: tiny models built from their config classes, offline; inputs by keyword, text with padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
import transformers.models.llama.modeling_llama  # what all models import, once for all processes
from torch import nn

from zoo_models import nested
from zoo_models.case import Case

_VOCAB, _TOKENS, _IMAGE = 40, 17, 32
# What configs call these; a name that a config does not know is no harm.
_COMMON: dict[str, Any] = {
    "vocab_size": _VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
_GQA = {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
}  # fmt: skip
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_VIT = {"image_size": _IMAGE, "patch_size": 8, "num_channels": 3, "vision_use_head": False}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}
_SPEECH = {
    "conv_dim": [32, 32], "conv_kernel": [8, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "output_hidden_size": 32,
}  # fmt: skip
_NOT_SETTABLE = {"xlnet": ("max_position_embeddings",)}

# model type: what differs from the common sizes
_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {}, "roberta": {}, "electra": {"embedding_size": 32}, "albert": {"embedding_size": 32},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 128}, "deberta": {},
    "deberta_v2": {}, "mpnet": {}, "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32},
    "squeezebert": {"embedding_size": 32}, "xlm_roberta": {}, "camembert": {}, "ernie": {}, "esm": {},
    "fnet": {}, 
    "convbert": {"embedding_size": 32}, "nystromformer": {}, "roformer": {"embedding_size": 32},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32}, "modernbert": {},
    "longformer": {"attention_window": 4}, "big_bird": {"attention_type": "original_full"},
    "megatron_bert": {}, "layoutlm": {"max_2d_position_embeddings": 32}, "ibert": {}, "data2vec_text": {}, "xlnet": {
        "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 128}, "nomic_bert": {},
}  # fmt: skip
_DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2,
    "num_heads": 4}, "gpt_neox": {}, "gptj": {"rotary_dim": 4, "n_positions": 64}, "gpt_bigcode": {"n_positions": 64},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32}, "bloom": {}, "codegen": {"rotary_dim": 4, "n_positions": 64,
    "n_ctx": 64}, "falcon": {}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "biogpt": {}, "llama": _GQA, "mistral": _GQA, "qwen2": _GQA, "qwen3": _GQA, "gemma": _GQA, "gemma2": _GQA,
    "gemma3_text": _GQA, "phi": {}, "phi3": {"num_key_value_heads": 2}, "stablelm": _GQA, "starcoder2": _GQA,
    "cohere": _GQA, "olmo": _GQA, "olmo2": _GQA, "granite": _GQA, "glm": _GQA, "persimmon": {}, "nemotron": _GQA,
    "smollm3": _GQA,
}  # fmt: skip
_MOE: dict[str, dict[str, Any]] = {
    "mixtral": _GQA | _EXPERTS, "qwen2_moe": _GQA | _EXPERTS, "qwen3_moe": _GQA | _EXPERTS, "olmoe": _GQA | _EXPERTS,
    "phimoe": _GQA | _EXPERTS, "gpt_oss": _GQA | _EXPERTS, "granitemoe": _GQA | _EXPERTS,
    "deepseek_v3": _EXPERTS | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}  # fmt: skip
_STATE_SPACE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4}, "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1,
    "chunk_size": 8}, "falcon_mamba": {"state_size": 4}, "jamba": _EXPERTS | {"num_key_value_heads": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
    "use_mamba_kernels": False}, "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1,
    "attention_window_size": 16}, "rwkv": {"attention_hidden_size": 32},
}  # fmt: skip
_ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": _T5, "mt5": _T5 | {"feed_forward_proj": "gated-gelu"}, "umt5": _T5, "longt5": _T5,
    "switch_transformers": _T5 | {"num_decoder_layers": 2, "num_experts": 4,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "bart": _SEQ2SEQ, "mbart": _SEQ2SEQ, "pegasus": _SEQ2SEQ, "marian": _SEQ2SEQ, "blenderbot": _SEQ2SEQ,
    "blenderbot_small": _SEQ2SEQ, "m2m_100": _SEQ2SEQ, "led": _SEQ2SEQ | {"attention_window": 4,
    "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}, "plbart": _SEQ2SEQ,
}  # fmt: skip
_VISION: dict[str, dict[str, Any]] = {
    "vit": _VIT, "deit": _VIT, "beit": _VIT, "dinov2": _VIT, "vit_mae": _VIT | {"mask_ratio": 0.5}, "vit_msn": _VIT,
    "yolos": _VIT | {"image_size": [_IMAGE, _IMAGE], "num_detection_tokens": 4}, "data2vec_vision": _VIT,
    "siglip_vision_model": _VIT, "clip_vision_model": _VIT | {"projection_dim": 32}, "ijepa": _VIT,
    "convnext": _STAGES | {"image_size": 64}, "convnextv2": _STAGES | {"image_size": 64},
    "resnet": _STAGES | {"embedding_size": 16},
    "regnet": _STAGES | {"embedding_size": 16, "groups_width": 8}, "bit": _STAGES | {"embedding_size": 16,
    "num_groups": 8}, "poolformer": _STAGES, "pvt_v2": _STAGES | {"num_attention_heads": [1, 2, 4, 4]},
    "segformer": _STAGES | {"num_attention_heads": [1, 2, 4, 4]},
    "swin": {"image_size": _IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
    "window_size": 4}, "swinv2": {"image_size": _IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
    "num_heads": [2, 4], "window_size": 4}, "focalnet": {"image_size": _IMAGE, "embed_dim": 16, "depths": [1, 1],
    "hidden_sizes": [16, 32], "focal_levels": [2, 2], "focal_windows": [3, 3]}, "mobilenet_v2": {"image_size": _IMAGE,
    "depth_multiplier": 0.35}, "levit": {"image_size": 64, "hidden_sizes": [32, 48, 64],
    "depths": [1, 1, 1], "num_attention_heads": [2, 3, 4], "key_dim": [8, 8, 8]}, "cvt": {"embed_dim": [16, 32, 48],
    "depth": [1, 2, 3],
    "num_heads": [1, 2, 3]},
}  # fmt: skip
_WAVES: dict[str, dict[str, Any]] = {
    "wav2vec2": _SPEECH, "hubert": _SPEECH, "wavlm": _SPEECH, "unispeech": _SPEECH,
    "data2vec_audio": _SPEECH | {"num_conv_pos_embeddings": 2},
    "sew": _SPEECH | {"squeeze_factor": 2}, "wav2vec2_conformer": _SPEECH | {"conv_depthwise_kernel_size": 7},
}  # fmt: skip


def cases() -> list[Case]:
    found = []
    for table, auto, inputs in (
        (_ENCODERS, transformers.AutoModel, _text), (_DECODERS, transformers.AutoModelForCausalLM, _text),
        (_MOE, transformers.AutoModelForCausalLM, _text), (_STATE_SPACE, transformers.AutoModelForCausalLM, _text),
        (_ENCODER_DECODERS, transformers.AutoModel, _pair), (_VISION, transformers.AutoModel, _image),
        (_WAVES, transformers.AutoModel, _wave),
    ):  # fmt: skip
        for name, settings in table.items():
            given = partial(_image, size=settings.get("image_size", _IMAGE)) if inputs is _image else inputs
            found.append(Case(name, name, partial(_build, name, auto, settings), given))
    return found + nested.cases()


def _build(name: str, auto: Any, settings: dict[str, Any]) -> nn.Module:
    config = _config(name, settings)
    if "num_experts" in settings and "d_kv" not in settings:  # the default runs at certain widths alone
        return auto.from_config(config, experts_implementation="eager")
    return auto.from_config(config)


def _config(name: str, settings: dict[str, Any]) -> Any:
    """A config with the common sizes that it knows and with `settings`."""
    try:
        kind = type(transformers.AutoConfig.for_model(name))
    except ValueError:
        kind = type(transformers.AutoConfig.for_model(name.replace("_", "-")))
    known = kind()
    if "depths" in settings or "depth" in settings:
        return kind(**settings)  # one size a stage
    common = {k: v for k, v in _COMMON.items() if hasattr(known, k) and k not in _NOT_SETTABLE.get(name, ())}
    return kind(**common | settings)


def _text(batch: int) -> Any:
    ids = torch.randint(3, _VOCAB, (batch, _TOKENS))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return (), {"input_ids": ids, "attention_mask": mask}


def _pair(batch: int) -> Any:
    _, given = _text(batch)
    return (), given | {"decoder_input_ids": torch.randint(3, _VOCAB, (batch, 6))}


def _image(batch: int, size: Any) -> Any:
    size = size[0] if isinstance(size, list) else size
    return (), {"pixel_values": torch.randn(batch, 3, size, size)}


def _wave(batch: int) -> Any:
    return (), {"input_values": torch.randn(batch, 800)}
