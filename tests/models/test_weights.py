"""Weights files: what fits is loaded whole, what does not is listed and leaves the model alone."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_compress.errors import UserError
from dist_compress.models import load_weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def save(state, path):
    state = {name: tensor.clone() for name, tensor in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_loads_whole(tmp_path, name, prefix):
    torch.manual_seed(0)
    source, model = Tied(), Tied()
    path = save({prefix + key: tensor for key, tensor in source.state_dict().items()}, tmp_path / name)
    assert not same(source, model)
    load_weights(model, path)
    assert same(source, model)


def test_ties_and_num_batches_tracked_may_be_missing(tmp_path):
    source, model = Tied(), Tied()
    state = source.state_dict()
    del state["head.weight"], state["norm.num_batches_tracked"]
    load_weights(model, save(state, tmp_path / "w.safetensors"))
    assert same(source, model) and model.head.weight is model.embed.weight


def test_the_wrapper_of_a_training_script_is_opened(tmp_path):
    source, model = Tied(), Tied()
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert same(source, model)


def test_every_key_that_does_not_fit_is_listed_and_nothing_is_changed(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = model.state_dict() | {
        "1.weight": torch.zeros(5, 4),
        "extra.a": torch.ones(1),
        "extra.b": torch.ones(1),
    }
    del state["0.bias"], state["2.weight"]
    path = save({n: t + 1 for n, t in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        load_weights(model, path)
    text = str(error.value)
    for word in (
        "model.weights",
        str(path),
        "0.bias",
        "2.weight",
        "extra.a",
        "extra.b",
        "1.weight",
        "[5, 4]",
        "[2, 4]",
    ):
        assert word in text
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("keep", [0, 5, 200])
def test_a_truncated_file_is_the_users_to_mend(tmp_path, name, keep):
    path = save(Tied().state_dict(), tmp_path / name)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.weights"):
        load_weights(Tied(), path)


def test_pickled_objects_and_missing_files_are_refused(tmp_path):
    torch.save(Tied(), tmp_path / "whole_model.pt")
    with pytest.raises(UserError, match="not unpickled"):
        load_weights(Tied(), tmp_path / "whole_model.pt")
    with pytest.raises(UserError, match="no such file"):
        load_weights(Tied(), tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="state_dict"):
        load_weights(Tied(), tmp_path / "list.pt")
