"""Data: the stream, splits in memory and on disk, augmentation by sample, and what is wrong with a folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_compress import comm
from dist_compress.config import DataConfig
from dist_compress.errors import UserError
from dist_compress.hashing import mix
from dist_compress.training import data
from dist_compress.training.data import augment
from dist_compress.training.data.files import read_image
from dist_compress.training.data.stream import Feed, Stream

CLASSES = ("ant", "bee", "cat")


def picture(i: int, width: int = 8, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """7 images a class to train, 3 to test, 8 x 8."""
    for split, count in (("train", 7), ("test", 3)):
        for label, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * label + i + 50 * (split == "test")).save(tmp_path / split / name / f"{i:02d}.png")
    return tmp_path


def config(root: Path, **options: object) -> DataConfig:
    return DataConfig(source="image_folder", root=str(root), image_size=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_samples", [100, 37, 5])
def test_each_sample_comes_once_an_epoch_whatever_the_batch(num_samples):
    stream = Stream(num_samples, seed=1, global_batch_size=12, micro_batch_size=4)
    pairs = [stream.micro(step, j) for step in range(40) for j in range(3)]
    ids, epochs = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    orders = []
    for epoch in range(480 // num_samples):
        orders.append(ids[epochs == epoch])
        assert orders[-1].sort().values.tolist() == list(range(num_samples))
    assert not torch.equal(orders[0], orders[1])
    other = Stream(num_samples, seed=1, global_batch_size=12, micro_batch_size=2)  # the order is of the samples
    assert torch.equal(torch.cat([other.micro(0, j)[0] for j in range(6)]), ids[:12])
    assert not torch.equal(Stream(num_samples, 2, 12, 4).micro(0, 0)[0], ids[:4])


def ids_of_two_steps() -> list[list[int]]:
    stream = Stream(50, seed=0, global_batch_size=20, micro_batch_size=4)
    split = SimpleNamespace(num_samples=50, batch=lambda ids, epochs: {"ids": ids})
    feed = Feed(split, stream, num_micro=5)  # type: ignore[arg-type]
    micros = range(comm.rank(), -(-5 // comm.world_size()) * comm.world_size(), comm.world_size())
    return [feed.batch(step, j)["ids"].tolist() if j < 5 else [] for step in range(2) for j in micros]


def test_the_ranks_share_the_stream_without_loss_or_repeat(ranks):
    single = {tuple(ids) for ids in ranks(1, ids_of_two_steps)[0]}
    assert len(single) == 10
    for n in (2, 3, 4):
        found = [tuple(ids) for result in ranks(n, ids_of_two_steps) for ids in result if ids]
        assert len(found) == 10 and set(found) == single


def test_digits_are_a_fixed_stratified_split():
    digits = data.build(DataConfig(image_size=32), seed=0)
    assert (digits.train.num_samples, digits.eval.num_samples, digits.num_classes) == (1437, 360, 10)
    batch = digits.eval.batch(torch.arange(360), None)
    assert batch["inputs"].shape == (360, 3, 32, 32) and batch["inputs"].dtype == torch.float32
    assert batch["inputs"].min() >= -1 and batch["inputs"].max() <= 1
    assert torch.equal(batch["inputs"][:, 0], batch["inputs"][:, 2])
    assert all(34 <= count <= 38 for count in batch["targets"].bincount().tolist())
    (inputs,), kwargs = digits.example(2)
    assert torch.equal(inputs, batch["inputs"][[0, 180]]) and not kwargs


def everything(root: str, in_memory: bool, augmentation: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    built = data.build(config(Path(root), in_memory=in_memory, augment=augmentation), seed=0)
    batch = built.train.batch(torch.arange(21), torch.arange(21) % 3)
    return batch["inputs"], batch["targets"]


def test_a_folder_is_read_alike_by_any_number_of_ranks_in_memory_and_on_demand(ranks, folder):
    inputs, targets = everything(str(folder), in_memory=False)
    assert targets.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert torch.allclose(inputs[8], (read_image(str(folder / "train/bee/01.png"), 8) / 255 - 0.5) / 0.5, atol=1e-6)
    for n in (1, 2, 3):
        for found, labels in ranks(n, everything, str(folder), True):
            assert torch.equal(found, inputs) and torch.equal(labels, targets)


def test_augmentation_is_the_same_in_memory_and_on_demand(folder):
    in_memory, on_demand = (everything(str(folder), m, "pad_crop_flip")[0] for m in (True, False))
    assert torch.equal(in_memory, on_demand)


def test_reading_ahead_changes_nothing(folder):
    split = data.build(config(folder, in_memory=False, augment="random_resized_crop"), seed=0).train
    ids, epochs = torch.tensor([3, 9]), torch.tensor([0, 1])
    expected = split.batch(ids, epochs)["inputs"]
    for _ in range(3):
        split.prefetch(ids, epochs)  # type: ignore[attr-defined]
    for announced in range(10):
        split.prefetch(ids + announced, epochs)  # type: ignore[attr-defined]
    assert torch.equal(split.batch(ids, epochs)["inputs"], expected)
    assert len(split.ahead) <= 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["pad_crop", "pad_crop_flip", "random_resized_crop"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_an_augmented_sample_depends_on_its_id_and_epoch_alone(folder, kind, in_memory):
    split = data.build(config(folder, augment=kind, in_memory=in_memory), seed=5).train
    ids, epochs = torch.tensor([4, 4, 12, 0]), torch.tensor([0, 1, 0, 0])
    together = split.batch(ids, epochs)["inputs"]
    alone = torch.cat([split.batch(ids[i : i + 1], epochs[i : i + 1])["inputs"] for i in range(4)])
    assert torch.equal(together, alone)
    plain = split.batch(ids, None)["inputs"]
    many = split.batch(torch.full((30,), 4), torch.arange(30))["inputs"]
    assert torch.equal(plain[0], plain[1]) and len({m.numpy().tobytes() for m in many}) >= 9  # all shifts by one pixel


def test_pad_crop_shifts_with_zeros_and_mirrors():
    image = torch.arange(1, 257, dtype=torch.int64).view(1, 1, 16, 16)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    shifts = {padded[0, 0, y : y + 16, x : x + 16].numpy().tobytes() for y in range(5) for x in range(5)}
    mirrored = {padded.flip(3)[0, 0, y : y + 16, x : x + 16].numpy().tobytes() for y in range(5) for x in range(5)}
    hashes = mix(0, torch.arange(400))
    plain = {o.numpy().tobytes() for o in augment.pad_crop(image.repeat(400, 1, 1, 1), hashes, flip=False)}
    flipped = {o.numpy().tobytes() for o in augment.pad_crop(image.repeat(400, 1, 1, 1), hashes, flip=True)}
    assert plain == shifts and flipped <= shifts | mirrored and flipped & shifts and flipped & mirrored


def test_images_of_other_sizes_are_cut_to_the_middle(tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.full((20, 60), 200, np.uint8)).save(path)  # grey, not square
    assert read_image(str(path), 8).shape == (3, 8, 8) and (read_image(str(path), 8) == 200).all()
    stripes = np.zeros((16, 48, 3), np.uint8)
    stripes[:, 16:32] = 255
    Image.fromarray(stripes).save(path)
    assert (read_image(str(path), 16) == 255).all()
    assert (read_image(str(path), 8, box=(0.0, 0.0, 0.3, 1.0)) == 0).all()


def break_folder(root: Path, how: str) -> None:
    if how == "no test":
        (root / "test").rename(root / "other")
    elif how == "class":
        (root / "test" / "cat").rename(root / "test" / "dog")
    elif how == "empty":
        for path in root.glob("train/*/*.png"):
            path.rename(path.with_suffix(".txt"))
    elif how == "image":
        (root / "train" / "bee" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")


def failure(root: str, options: dict[str, object]) -> str:
    try:
        data.build(config(Path(root), **options), seed=0).train.batch(torch.arange(21), None)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "words"),
    [("no test", "needs the folders train and test (or val)"), ("class", "Only in one of them: cat, dog"),
     ("empty", "nothing in"), ("image", "03.png cannot be read")],
)  # fmt: skip
def test_a_folder_that_will_not_do_is_told_on_every_rank(ranks, folder, how, words):
    break_folder(folder, how)
    for text in ranks(2, failure, str(folder), {"in_memory": True}):
        assert text.startswith("data.root") and words in text
    if how == "image":
        assert words in failure(str(folder), {"in_memory": False})


def test_more_ranks_than_samples(ranks, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        picture(0).save(tmp_path / split / "one" / "0.png")
    for text in ranks(2, failure, str(tmp_path), {}):
        assert "1 training and 1 evaluation samples for world size 2" in text


@pytest.mark.parametrize(
    ("options", "key"),
    [({"source": "mnist"}, "data.source='mnist'"), ({"augment": "flip"}, "data.augment='flip'"),
     ({"image_size": 0}, "data.image_size=0"), ({"mean": [0.1, 0.2]}, r"data.mean=\[0.1, 0.2\]"),
     ({"std": [0.0]}, "data.std"), ({"source": "cifar10"}, "data.root is not set"),
     ({"source": "image_folder", "root": "/no/where"}, "data.root='/no/where': there is no such folder"),
     ({"source": "cifar10", "root": "/no/where"}, "data.root='/no/where': no CIFAR-10"),
     ({"source": "imagenet", "root": "/no/where"}, "data.root='/no/where': no ImageNet")],
)  # fmt: skip
def test_bad_configuration_names_its_key(options, key):
    with pytest.raises(UserError, match=key):
        data.build(DataConfig(**options), seed=0)


def test_a_users_own_data():
    class Split:
        num_samples, num_classes = 4, 2

        def batch(self, ids, epoch):
            return {"inputs": {"x": ids.float()}, "targets": ids % 2, "ids": ids}

    import sys

    sys.modules["my_data"] = SimpleNamespace(  # type: ignore[assignment]
        both=lambda: SimpleNamespace(train=Split(), eval=Split()), half=lambda: SimpleNamespace(train=Split())
    )
    built = data.build(DataConfig(target={"_target_": "my_data.both"}), seed=0)
    args, kwargs = built.example(6)
    assert not args and kwargs["x"].tolist() == [0, 1, 2, 3, 0, 1]
    with pytest.raises(UserError, match=r"data\._target_='my_data.half'.*`eval` lacks one"):
        data.build(DataConfig(target={"_target_": "my_data.half"}), seed=0)
