"""Forward passes that are only looked at: the steps of a calibration, in evaluation mode and without gradients.

Micro-batch j of a step goes to rank j mod N, as in training. The samples are those of the first steps of the training
stream, without augmentation.
"""

from __future__ import annotations

import torch

from dist_compress import comm
from dist_compress.calling import call
from dist_compress.method import Listener
from dist_compress.training.evaluation import autocast
from dist_compress.training.loop import Trainer


@torch.no_grad()
def calibrate(trainer: Trainer, listener: Listener, num_steps: int) -> None:
    """Show `listener` the model on `num_steps` global batches. Collective; no number depends on the ranks."""
    model, split, stream = trainer.model, trainer.data.train, trainer.feed.stream
    was_training = model.training
    model.eval()
    listener.calibrating = True
    for step in range(num_steps):
        num_micro, ranks = trainer.length.num_micro, comm.world_size()
        for micro in range(comm.rank(), -(-num_micro // ranks) * ranks, ranks):
            live = micro < num_micro
            batch = split.batch(stream.micro(step, micro if live else 0)[0], None)
            with autocast(trainer.config.train.precision):
                call(model, batch["inputs"])  # by every rank: of a sharded model it is collective
            if live:
                listener.count_pass()
        listener.end_step()
    trainer.backend.rest()
    listener.calibrating = False
    model.train(was_training)
