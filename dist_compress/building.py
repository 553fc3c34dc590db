"""The networks of a run: the student, and the teacher that it learns from."""

from __future__ import annotations

import logging

import torch
from torch import nn

from dist_compress import comm, models
from dist_compress.backends.answering import spread_answering
from dist_compress.config import Config, ModelConfig
from dist_compress.distillation.teacher import DTYPES
from dist_compress.errors import UserError
from dist_compress.initial import Example, Initial, begin
from dist_compress.training.batchnorm import use_sync_batchnorm
from dist_compress.training.data import Data
from dist_compress.training.data.tokenizer import check_vocabulary

log = logging.getLogger(__name__)


class Builder:
    """Everything is the same on every rank, and local unless it says otherwise. The data may say how many classes a
    model needs."""

    def __init__(self, config: Config, data: Data) -> None:
        self.config, self.data = config, data

    def student(self) -> nn.Module:
        """The model as configured, with the weights that it begins with."""
        return self.placed(self.built(self.config.model))

    def initial(self, sharded: bool, example: Example) -> Initial:
        """The student to be trained, with its weights, the same on every rank. `sharded`: its parameters are going to
        be, so no device is given all of them. Collective. Raises UserError on every rank."""
        if sharded:
            return begin(self._modules, self._loaded, self.placed, example)
        return Initial(self.placed(self._loaded()), example)

    def _modules(self) -> nn.Module:
        model = self.built(self.config.model)
        return use_sync_batchnorm(model) if self.config.train.sync_batchnorm else model

    def _loaded(self) -> nn.Module:
        wanted, model = self.config.model, self._modules()
        if wanted.weights is not None:
            models.load_weights(model, wanted.weights)
        check_vocabulary(model, wanted, self.data.train, "model")
        return model

    def built(self, wanted: ModelConfig, whole: bool = False) -> nn.Module:
        """With the classes and the vocabulary of the data. `whole`: nothing of it is made new beside weights of a
        folder. Local."""
        return models.build(wanted, self.data.num_classes, self.config.seed, self.data.vocab_size, whole)

    def teacher(self) -> nn.Module:
        """The network that a student learns from, with its weights, the same on every rank: on its device, or sharded
        (`distillation.teacher.sharded`), so that no device is given all of it. Collective. Raises UserError on every
        rank."""
        how = self.config.distillation.teacher
        if not (how.sharded and comm.is_initialized()):
            return self.placed(self._taught())
        initial = begin(self._teacher_modules, self._taught, self.placed, self.data.example(2))
        for note in initial.notes if comm.rank() == 0 else ():
            log.warning("distillation.teacher: %s", note)
        model = initial.model.to(DTYPES[how.precision])
        spread_answering(model, self.config, initial.source(needed=how.mode != "self"))
        return model

    def _teacher_modules(self) -> nn.Module:
        how = self.config.distillation.teacher
        if how.mode == "self":
            return self.built(self.config.model)
        try:
            return self.built(how.model, whole=True)
        except UserError as error:
            raise UserError(f"distillation.teacher: {error}") from None

    def _taught(self) -> nn.Module:
        wanted = self.config.distillation.teacher.model
        if self.config.distillation.teacher.mode == "self":
            return self._teacher_modules()  # the weights come when it starts to teach
        if wanted.weights is None and wanted.target is None and not models.has_weights(wanted):
            raise UserError(
                "distillation.teacher.model.weights is not set: a teacher with random weights teaches noise. Give a "
                "file of weights, such as model.safetensors of another run."
            )
        model = self._teacher_modules()
        if wanted.weights is not None:
            models.load_weights(model, wanted.weights, "distillation.teacher.model.weights")
        check_vocabulary(model, wanted, self.data.train, "distillation.teacher.model")
        return model

    def placed(self, model: nn.Module) -> nn.Module:
        """On this rank's device, in the memory format of the run. Local."""
        model = model.to(comm.device())
        if self.config.train.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model
