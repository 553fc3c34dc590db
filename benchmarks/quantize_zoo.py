"""Families of models, quantized by the default list after some batches, and exported; no list is written by hand.

    python benchmarks/quantize_zoo.py [NAME ...]

Nets for images are trained for some steps on the embedded digits first: at random their answers hang on ties. Language
models have random weights. int8 weights, uint8 inputs of convolutions and linear layers. Each file is loaded and
compared with the simulated model on held-out samples, as at the end of a run. Prints a Markdown table: what was
quantized, how many classes are a top-1, max_diff and agreement of the files, size and speed of model.onnx beside those
of the float model in ONNX Runtime, in turns on one thread.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from torch import nn

from dist_compress import models
from dist_compress.config import Config, DataConfig, ModelConfig, QuantizationConfig
from dist_compress.errors import UserError
from dist_compress.export import onnx, torch_export, torchao
from dist_compress.export.parts.call import main_output, outputs
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.quantization import Quantizer, cpu, round_biases
from dist_compress.speedup.cost import latencies
from dist_compress.target import Coupling
from dist_compress.training import data

IMAGE, TOKENS, VOCABULARY = 32, 16, 512
TRAINING_STEPS = 150  # of 64 images
TIME_S = 1.0  # of timing a model
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@functools.cache
def digits() -> data.Data:
    return data.build(DataConfig(image_size=IMAGE), seed=0)


def images(num: int, generator: torch.Generator, held_out: bool = False) -> Any:
    split = digits().eval if held_out else digits().train
    return (split.batch(torch.randint(split.num_samples, (num,), generator=generator), None)["inputs"],), {}


def tokens(num: int, generator: torch.Generator, held_out: bool = False) -> Any:
    ids = torch.randint(3, VOCABULARY, (num, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, TOKENS // 2 :] = 0
    return (), {"input_ids": ids, "attention_mask": mask}


def torchvision_model(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=10, **kwargs)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(IMAGE, 8, 2, 4, 64, 128, num_classes=10)


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=4, **SIZE)
    return transformers.BertForSequenceClassification(config)


def llama(**kwargs: Any) -> Callable[[], nn.Module]:
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SIZE, **kwargs)
    return lambda: transformers.LlamaForCausalLM(config)


WEIGHTS_OF_4_BITS = {
    "config_list": [
        {
            "op_types": ["Linear"],
            "target_settings": {
                "_input_0": {"granularity": "per_token"},
                "weight": {"quant_dtype": "int4", "granularity": "per_group(32)"},
            },
        }
    ]
}
ADDITIONS = {"config_list": [{"op_types": ["Conv2d", "Linear"]}, {"op_types": ["add"]}]}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], dict[str, Any]]] = {
    "resnet20 (CIFAR)": (lambda: models.build(ModelConfig(), 10, 0), images, {}),
    "resnet18": (torchvision_model("resnet18"), images, {}),
    "resnet18, additions too": (torchvision_model("resnet18"), images, ADDITIONS),
    "mobilenet_v2": (torchvision_model("mobilenet_v2"), images, {}),
    "vit_b_16's code, 2 layers of 64": (vit, images, {}),
    "BERT, 2 layers of 64": (bert, tokens, {}),
    "Llama, 2 layers of 64": (llama(), tokens, {}),
    "Llama, tied embeddings": (llama(tie_word_embeddings=True), tokens, {}),
    "Llama, int4 groups, per_token": (llama(), tokens, WEIGHTS_OF_4_BITS),
}


def quantized(model: nn.Module, batches: list[Any], **config: Any) -> Quantizer:
    """`model`, in place, calibrated on `batches` and as it is delivered. The first batch is the example."""
    quantizer = Quantizer(Config(quantization=QuantizationConfig(method="ptq", **config)))
    args, kwargs = batches[0]
    quantizer.attach(Context(Config(), model, Projection(model), Coupling(), 1, 1, 1.0, (args, kwargs)))
    quantizer.observed.calibrating = True
    with torch.no_grad():
        for args, kwargs in batches:
            model(*args, **kwargs)
            quantizer.observed.count_pass()
            quantizer.observed.end_step()
    quantizer.observed.calibrating = False
    quantizer.begin()
    quantizer.fold()
    round_biases(model)
    return quantizer


def learned(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """`model`, trained in place on digits."""
    optimizer, split = torch.optim.Adam(model.parameters(), 1e-3), digits().train
    for _ in range(TRAINING_STEPS):
        batch = split.batch(torch.randint(split.num_samples, (64,), generator=generator), None)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(batch["inputs"]), batch["targets"]).backward()
        optimizer.step()
    return model.eval()


def row(name: str) -> list[str]:
    build, draw, config = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = learned(build(), generator) if draw is images else build().eval()
    dense = copy.deepcopy(model)
    example, held_out = draw(2, generator), draw(256, generator, held_out=True)
    quantizer = quantized(model, [draw(8, generator) for _ in range(2)], **config)
    found = outputs(model, held_out)
    num_classes = len(found[main_output(found)].argmax(-1).unique())
    if num_classes < 2:
        raise RuntimeError(f"{name}: the same top-1 for every sample, so that agreement would mean nothing.")
    cells = [name, f"{len(quantizer.parameters)} + {len(quantizer.activations)}", str(num_classes)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        for format in (onnx, torch_export, torchao):
            try:
                format.export(folder, model, None, Config(), example)
                found = format.check(folder, model, held_out)
                cells.append(f"{found['max_diff']:.2f}, {found['top1_agreement']:.1%}")
            except UserError as error:
                cells.append("refused")
                print(f"{name}: {error}", file=sys.stderr)
            except RuntimeError as error:  # the gates
                cells.append("does not ship: " + str(error).partition(format.FILE)[2].partition(". It")[0].strip())
                print(f"{name}: {error}", file=sys.stderr)
        onnx.export(other, dense, None, Config(), example)
        files = {"fp32": Path(other) / onnx.FILE, "int8": Path(folder) / onnx.FILE}
        cells.append(" -> ".join(f"{file.stat().st_size / 1e3:.0f} kB" for file in files.values()))
        took = latencies({name: onnx.Runtime(file) for name, file in files.items()}, *example, (1, 32), TIME_S)
        for batch in ("b1", "b32"):
            cells.append(" -> ".join(f"{took[name][batch]['p50']:.2f} ms" for name in files))
    return cells


def main(*names: str) -> None:
    columns = ["model", "weights + inputs", "classes", "onnx", "torch_export", "torchao", "file", "batch 1", "batch 32"]
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|")
    for name in names or MODELS:
        print("|", " | ".join(row(name)), "|", flush=True)
    print(f"\nint8 dot products: {', '.join(cpu.dot_products()) or 'none'}; torch {torch.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
