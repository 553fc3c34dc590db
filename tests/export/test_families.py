"""Models of transformers and torchvision, quantized as by default: files for any batch and length, with their masks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "quantization"))
from nets import calibrated  # noqa: E402

from dist_compress.config import Config  # noqa: E402
from dist_compress.export import torch_export, torchao  # noqa: E402
from dist_compress.export.parts.call import main_output, outputs  # noqa: E402
from dist_compress.quantization import round_biases  # noqa: E402

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def tokens(num, length):
    ids = torch.randint(3, 64, (num, length), generator=torch.Generator().manual_seed(num))
    mask = torch.ones_like(ids)
    mask[::2, length // 2 :] = 0
    return (), {"input_ids": ids, "attention_mask": mask}


def images(num, _):
    return (torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(num)),), {}


def built(name):
    import transformers

    torch.manual_seed(0)
    if name == "vit":
        model = torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 32, num_classes=10)
        torch.nn.init.normal_(model.heads.head.weight)  # which starts at zero: nothing could differ
        return model
    if name == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **SIZE))
    config = transformers.LlamaConfig(tie_word_embeddings=True, num_key_value_heads=1, **SIZE)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "draw", "formats"),
    [
        ("vit", images, [torch_export]),
        ("bert", tokens, [torch_export, torchao]),
        ("llama", tokens, [torch_export, torchao]),
    ],
)
def test_a_family(tmp_path, name, draw, formats):
    pytest.importorskip("torchao")
    example, held_out = draw(2, 6), draw(20, 9)
    model = built(name)
    calibrated(model, example, method="ptq").fold()
    round_biases(model)
    found = outputs(model, held_out)
    assert len(found[main_output(found)].argmax(-1).unique()) > 1  # else any file would agree
    for format in formats:
        format.export(tmp_path, model, None, Config(), example)
        found = format.check(tmp_path, model, held_out)
        assert found["max_diff"] < 2 and found["top1_agreement"] >= 0.98 and found["num_integers"] > 32 * 32
    assert torch_export.check(tmp_path, model, held_out)["max_diff"] == 0.0
