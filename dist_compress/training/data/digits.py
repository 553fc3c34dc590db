"""scikit-learn's handwritten digits (Alpaydin and Kaynak 1998): real, embedded, nothing to download.

1797 grey images of 8 x 8 pixels in 17 levels, enlarged to the wanted size and given three equal channels. The
360 evaluation images are drawn once and for all, with every class in proportion.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_compress.config import DataConfig
from dist_compress.training.data.files import Pixels, resize

NUM_EVAL = 360


def load(config: DataConfig) -> tuple[Pixels, Pixels]:
    """(train, eval): 1437 and 360 images. Local."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    grey = torch.from_numpy(digits.images).float().mul(255 / 16).round().to(torch.uint8)
    images = resize(grey[:, None], config.image_size).expand(-1, 3, -1, -1)
    targets = torch.from_numpy(digits.target).long()
    parts = train_test_split(range(len(targets)), test_size=NUM_EVAL, random_state=0, stratify=digits.target)
    train, held_out = (torch.tensor(ids) for ids in parts)
    return Pixels(images[train], targets[train], 10), Pixels(images[held_out], targets[held_out], 10)
