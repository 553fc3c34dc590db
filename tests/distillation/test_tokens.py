"""Hidden states of text: tokens of padding count nowhere, the others each once, whatever the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_compress.config import load
from dist_compress.distillation.distiller import Distiller
from dist_compress.distillation.teacher import OnlineTeacher
from dist_compress.distillation.tokens import tokens_of
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.target import Coupling

LENGTHS = [5, 2, 3]


class Heads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], 2, -1).transpose(1, 2)


class Reader(nn.Module):
    """Each token by itself, then a class of the text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.layer, self.heads = nn.Embedding(9, width), nn.Linear(width, width), Heads()
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.layer(self.embed(input_ids))
        self.heads(x)
        return self.head(x) if attention_mask is None else self.head((x * attention_mask[..., None]).sum(1))


def attached(entry: dict[str, Any], width: int = 6, per_token: bool = False) -> tuple[Distiller, Reader, Reader]:
    torch.manual_seed(1)
    student, teacher = Reader(6), Reader(width)
    config = load({"distillation": {"config_list": [{"op_names": ["layer"], **entry}]}})
    distiller = Distiller(config, OnlineTeacher(teacher))
    example = ((), batch(per_token)["inputs"])
    distiller.attach(Context(config, student, Projection(student), Coupling(), 2, 10, 5.0, example))
    return distiller, student, teacher


def batch(per_token: bool, filler: int = 0) -> dict[str, Any]:
    ids = torch.arange(15).view(3, 5) % 8 + 1
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    ids = ids.masked_fill(~mask, filler)
    if per_token:
        return {"inputs": {"input_ids": ids}, "targets": torch.where(mask, 1, -100)}
    return {"inputs": {"input_ids": ids, "attention_mask": mask.long()}, "targets": torch.zeros(3, dtype=torch.int64)}


def loss(parts: tuple[Distiller, Reader, Reader], of: dict[str, Any]) -> float:
    distiller, student, _ = parts
    [found] = distiller.loss(0, of, student(**of["inputs"])).values()
    return float(found.detach())


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    ("method", "width"),
    [("fitnets", 6), ("fitnets", 8), ("dynamic_layerwise", 8), ("adaptive_1d_layerwise", 8), ("attention_transfer", 8)],
)
def test_padding_does_not_count(method: str, width: int, per_token: bool):
    parts = attached({"method": method}, width, per_token)
    found = loss(parts, batch(per_token))
    assert found > 0 and loss(parts, batch(per_token, filler=7)) == pytest.approx(found, rel=1e-6)
    changed = batch(per_token)
    changed["inputs"]["input_ids"][1, 1] = 8  # negative control: a token that counts
    assert loss(parts, changed) != pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("apply_method", ["mse", "kl"])
def test_tokens_count_once_each_where_they_have_targets_and_else_each_text_once(apply_method: str):
    for per_token in (True, False):
        parts = attached({"method": "fitnets", "apply_method": apply_method}, 6, per_token)
        of = batch(per_token)
        own, theirs = (net.layer(net.embed(of["inputs"]["input_ids"])).detach().double() for net in parts[1:])
        if apply_method == "mse":
            each = (own - theirs).square().mean(2)
        else:
            p = theirs.softmax(2)
            each = (p * (p.log() - own.log_softmax(2))).sum(2)
        sums = torch.stack([row[:length].sum() for row, length in zip(each, LENGTHS, strict=True)])
        right = sums.sum() if per_token else (sums / torch.tensor(LENGTHS)).sum()
        assert loss(parts, of) == pytest.approx(float(right), rel=1e-5)


def test_a_micro_batch_without_a_token_that_counts_is_zero():
    of = batch(True)
    of["targets"][:] = -100
    for method in ("fitnets", "attention_transfer"):
        assert loss(attached({"method": method, "apply_method": "kl"}, 6, True), of) == 0


def test_images_have_no_tokens():
    images = {"inputs": torch.zeros(2, 3, 4, 4), "targets": torch.zeros(2, dtype=torch.int64)}
    assert tokens_of(images) is None
    assert tokens_of({**images, "targets": torch.zeros(2, 5)}) is None  # probabilities


def test_what_has_padding_where_no_mask_reaches_is_refused():
    with pytest.raises(UserError, match=r"heads._output_0 is \[3, 2, 5, 3\]: padding tokens would count in it"):
        attached({"op_names": ["heads"], "method": "fitnets"})
