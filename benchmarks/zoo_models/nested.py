"""Hugging Face models whose configs nest others, or whose inputs are of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import nn

from zoo_models.case import Case

VOCAB, TOKENS, IMAGE = 40, 17, 32
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
TOKEN_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = SIZES | TOKEN_IDS | {"max_position_embeddings": 64}
VISION = SIZES | {"image_size": IMAGE, "patch_size": 8}
AUDIO = {"num_mel_bins": 16, "max_source_positions": 32}
ASR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_start_token_id": 1,
}  # fmt: skip
DETR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "num_queries": 6,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_labels": 3,
}  # fmt: skip


def text(batch: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (batch, TOKENS))
    ids[:, -1] = 2  # the end of the text, which CLIP pools
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(batch: int, size: int = IMAGE) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def both(batch: int) -> dict[str, torch.Tensor]:
    return text(batch) | image(batch)


def clip_like(kind: str) -> nn.Module:
    config = getattr(hf, f"{kind}Config")(text_config=TEXT, vision_config=VISION, projection_dim=32)
    return getattr(hf, f"{kind}Model")(config)


def llava(kind: str) -> nn.Module:
    vision = hf.CLIPVisionConfig(**VISION)
    language = hf.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = getattr(hf, f"{kind}Config")(vision_config=vision, text_config=language, image_token_index=3)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def with_image_tokens(batch: int, count: int) -> dict[str, torch.Tensor]:
    given = text(batch) | image(batch)
    marks = torch.full((batch, count), 3)
    tokens = given["input_ids"].clamp(min=4)
    ids = torch.cat([tokens[:, :1], marks, tokens[:, 1:]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": given["pixel_values"]}


def features(batch: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch, 16, 64), "decoder_input_ids": torch.randint(3, VOCAB, (batch, 5))}


def speech_features(batch: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch, 40, 16), "decoder_input_ids": torch.randint(3, VOCAB, (batch, 5))}


def detector(kind: str, **settings: Any) -> nn.Module:
    backbone = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1],
                               out_features=settings.pop("out_features", ["stage4"]))  # fmt: skip
    config = getattr(hf, f"{kind}Config")(**DETR, backbone_config=backbone, use_timm_backbone=False, **settings)
    return getattr(hf, f"{kind}ForObjectDetection")(config)


def video(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 4, 3, IMAGE, IMAGE)}


def series(batch: int) -> dict[str, torch.Tensor]:
    return {"past_values": torch.randn(batch, 32, 3)}


def forecast(batch: int) -> dict[str, torch.Tensor]:
    return {
        "past_values": torch.randn(batch, 16), "past_time_features": torch.randn(batch, 16, 2),
        "past_observed_mask": torch.ones(batch, 16), "future_values": torch.randn(batch, 4),
        "future_time_features": torch.randn(batch, 4, 2),
    }  # fmt: skip


def trajectory(batch: int) -> dict[str, torch.Tensor]:
    return {
        "states": torch.randn(batch, 5, 4), "actions": torch.randn(batch, 5, 2), "rewards": torch.randn(batch, 5, 1),
        "returns_to_go": torch.randn(batch, 5, 1), "timesteps": torch.arange(5).expand(batch, 5),
        "attention_mask": torch.ones(batch, 5),
    }  # fmt: skip


def region_text(batch: int) -> dict[str, torch.Tensor]:
    return text(batch) | {"visual_feats": torch.randn(batch, 4, 24), "visual_pos": torch.rand(batch, 4, 4)}


def visual_embeds(batch: int) -> dict[str, torch.Tensor]:
    return text(batch) | {"visual_embeds": torch.randn(batch, 4, 24)}


def spectrogram(batch: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 48, 16)}


def caption(batch: int) -> dict[str, torch.Tensor]:
    return image(batch) | {"decoder_input_ids": torch.randint(3, VOCAB, (batch, 5))}


def vision_encoder_decoder() -> nn.Module:
    decoder = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), decoder)
    return hf.VisionEncoderDecoderModel(config)


def encoder_decoder() -> nn.Module:
    decoder = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**TEXT), decoder)
    return hf.EncoderDecoderModel(config)


def seq2seq(batch: int) -> dict[str, torch.Tensor]:
    return text(batch) | {"decoder_input_ids": torch.randint(3, VOCAB, (batch, 5))}


_TIME = {"d_model": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "context_length": 32, "patch_length": 8}
_FORECAST = ASR | {
    "d_model": 16, "prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 3, 4],
    "num_time_features": 2,
}  # fmt: skip
_FORECAST.pop("decoder_start_token_id")

Built = tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]
_MODELS: dict[str, Built] = {
    "clip": (lambda: clip_like("CLIP"), both),
    "siglip": (lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT | {"projection_size": 32},
        vision_config=VISION)), both),
    "chinese_clip": (lambda: clip_like("ChineseCLIP"), both),
    "clipseg": (lambda: clip_like("CLIPSeg"), both),
    "altclip": (lambda: clip_like("AltCLIP"), both),
    "owlvit": (lambda: hf.OwlViTModel(hf.OwlViTConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)),
        both),
    "blip": (lambda: hf.BlipModel(hf.BlipConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)), both),
    "vilt": (lambda: hf.ViltModel(hf.ViltConfig(**TEXT, image_size=IMAGE, patch_size=8)), both),
    "git": (lambda: hf.GitModel(hf.GitConfig(**TEXT, vision_config=VISION)), both),
    "llava": (lambda: llava("Llava"), lambda batch: with_image_tokens(batch, 16)),
    "vipllava": (lambda: hf.VipLlavaForConditionalGeneration(hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=3, vision_feature_layers=[-1, -2])), lambda batch: with_image_tokens(batch, 16)),
    "lxmert": (lambda: hf.LxmertModel(hf.LxmertConfig(**TEXT, l_layers=1, x_layers=1, r_layers=1,
        visual_feat_dim=24)), region_text),
    "visual_bert": (lambda: hf.VisualBertModel(hf.VisualBertConfig(**TEXT, visual_embedding_dim=24)), visual_embeds),
    "vision_encoder_decoder": (vision_encoder_decoder, caption),
    "encoder_decoder": (encoder_decoder, seq2seq),
    "whisper": (lambda: hf.WhisperModel(hf.WhisperConfig(**ASR, **TOKEN_IDS, **AUDIO, max_target_positions=16)),
        features),
    "speech_to_text": (lambda: hf.Speech2TextModel(hf.Speech2TextConfig(**ASR, **TOKEN_IDS, input_feat_per_channel=16,
        conv_channels=32, max_source_positions=64, max_target_positions=16)), speech_features),
    "audio_spectrogram_transformer": (lambda: hf.ASTModel(hf.ASTConfig(**SIZES, patch_size=8, max_length=48,
        num_mel_bins=16,
        frequency_stride=8, time_stride=8)), spectrogram),
    "detr": (lambda: detector("Detr"), partial(image, size=64)),
    "conditional_detr": (lambda: detector("ConditionalDetr"), partial(image, size=64)),
    "deformable_detr": (lambda: detector("DeformableDetr", num_feature_levels=2, out_features=["stage3", "stage4"]),
        partial(image, size=64)),
    "videomae": (lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**VISION, num_frames=4)), video),
    "vivit": (lambda: hf.VivitModel(hf.VivitConfig(**SIZES, image_size=IMAGE, num_frames=4, tubelet_size=[2, 8, 8])),
        video),
    "timesformer": (lambda: hf.TimesformerModel(hf.TimesformerConfig(**VISION, num_frames=4)), video),
    "dpt": (lambda: hf.DPTForSemanticSegmentation(hf.DPTConfig(**VISION | {"num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 24, 24], fusion_hidden_size=16, reassemble_factors=[4, 2, 1, 0.5])), image),
    "patchtst": (lambda: hf.PatchTSTModel(hf.PatchTSTConfig(**_TIME, num_input_channels=3, ffn_dim=64)), series),
    "patchtsmixer": (lambda: hf.PatchTSMixerModel(hf.PatchTSMixerConfig(d_model=16, num_layers=2, context_length=32,
        patch_length=8, patch_stride=8, num_input_channels=3)), series),
    "time_series_transformer": (lambda: hf.TimeSeriesTransformerModel(hf.TimeSeriesTransformerConfig(**_FORECAST)),
        forecast),
    "informer": (lambda: hf.InformerModel(hf.InformerConfig(**_FORECAST)), forecast),
    "decision_transformer": (lambda: hf.DecisionTransformerModel(hf.DecisionTransformerConfig(state_dim=4, act_dim=2,
        hidden_size=32, n_layer=2, n_head=4, max_ep_len=16, vocab_size=4)), trajectory),
    "perceiver": (lambda: hf.PerceiverModel(hf.PerceiverConfig(num_latents=6, d_latents=32, d_model=24, num_blocks=1,
        num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4)),
        lambda batch: {"inputs": torch.randn(batch, 7, 24)}),
    "funnel": (lambda: hf.FunnelModel(hf.FunnelConfig(vocab_size=VOCAB, block_sizes=[1, 1], num_decoder_layers=1,
        d_model=32,
        n_head=4, d_head=8, d_inner=128)), text),
    "univnet": (lambda: hf.UnivNetModel(hf.UnivNetConfig(model_in_channels=8, model_hidden_channels=8, num_mel_bins=8,
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], resblock_stride_sizes=[4],
        kernel_predictor_hidden_channels=8)),
        lambda batch: {"input_features": torch.randn(batch, 10, 8), "noise_sequence": torch.randn(batch, 10, 8)}),
    "encodec": (lambda: hf.EncodecModel(hf.EncodecConfig(num_filters=8, hidden_size=16, codebook_size=8,
        codebook_dim=16,
        upsampling_ratios=[4, 2], num_lstm_layers=1)), lambda batch: {"input_values": torch.randn(batch, 1, 400)}),
}  # fmt: skip


def cases() -> list[Case]:
    return [Case(name, name, build, partial(_inputs, given)) for name, (build, given) in _MODELS.items()]


def _inputs(given: Callable[[int], dict[str, Any]], batch: int) -> Any:
    return (), given(batch)
