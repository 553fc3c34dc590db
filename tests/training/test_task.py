"""Losses and metrics are sums over the samples; a user's own task is checked."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dist_compress.config import TaskConfig
from dist_compress.errors import UserError
from dist_compress.training import task

OUTPUT = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.5]])
BATCH = {"targets": torch.tensor([0, 1, 2])}


def test_sums_over_samples_whatever_the_shape_of_the_output():
    classification = task.build(TaskConfig(label_smoothing=0.1))
    expected = F.cross_entropy(OUTPUT, BATCH["targets"], label_smoothing=0.1) * 3
    for output in (OUTPUT, SimpleNamespace(logits=OUTPUT)):
        assert torch.allclose(classification.loss(output, BATCH), expected)
        assert classification.metrics(output, BATCH)["accuracy"] == 2 and classification.count(BATCH) == 3


def test_side_classifiers_count_for_less_and_may_be_off():
    outputs = namedtuple("outputs", ["logits", "aux_logits2", "aux_logits1"])
    classification = task.build(TaskConfig())
    plain = classification.loss(OUTPUT, BATCH)
    assert torch.allclose(classification.loss(outputs(OUTPUT, OUTPUT, OUTPUT), BATCH), 1.6 * plain)
    assert torch.allclose(classification.loss(outputs(OUTPUT, None, None), BATCH), plain)


def test_a_users_task_needs_its_methods():
    good = TaskConfig(target={"_target_": "dist_compress.training.task.Classification", "label_smoothing": 0.2})
    assert task.build(good).label_smoothing == 0.2
    for target, words in [
        ({"_target_": "collections.OrderedDict"}, "no loss, count, metrics"),
        ({"_target_": "nowhere.at_all"}, "cannot be imported"),
        ({"_target_": "dist_compress.training.task.Classification", "smoothing": 1}, "smoothing"),
    ]:
        with pytest.raises(UserError, match=rf"task\._target_=.*{words}"):
            task.build(TaskConfig(target=target))
    with pytest.raises(UserError, match=r"task\.source='regression'"):
        task.build(TaskConfig(source="regression"))
