"""The command that tells what of a model can shrink."""

import pytest
import torch
from torch import nn

from dist_compress import explain


class Net(nn.Sequential):
    def __init__(self, num_classes=3):
        layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, num_classes))
        super().__init__(*layers)


def test_a_table_and_a_drawing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    explain.main([f"{__name__}.Net", "--input", "2,4", "--svg", str(tmp_path / "net.svg")])
    said = capsys.readouterr().out
    assert "3 coupling groups" in said and "yes" in said and "addmm in 2" in said and "normalises over it" in said
    drawn = (tmp_path / "net.svg").read_text()
    assert drawn.startswith("<svg") and drawn.count("<title>") > 5 and "8 stay: native_layer_norm" in drawn


def test_norm_exact_frees_what_a_norm_blocked(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    explain.main([f"{__name__}.Net", "--input", "2,4", "--norm", "exact"])
    said = capsys.readouterr().out
    assert "normalises over it" not in said and said.count("yes") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet5000"], "resnet5000"),
        ([f"{__name__}.Nets"], "Nets"),
        ([f"{__name__}.Net", "--input", "2,x"], "--input=2,x"),
        ([f"{__name__}.Net", "--input", "2,4", "--dtype", "float"], None),
        ([f"{__name__}.Net", "--input", "2,4", "--dtype", "single32"], "--dtype=single32"),
        ([f"{__name__}.Net", "--input", "2,4", "--norm", "off"], "norm='off'"),
        ([f"{__name__}.Net", "--input", "2,5"], "2x5"),
    ],
)
def test_what_cannot_be_is_told(words, message, capsys):
    if message is None:
        return explain.main(words)
    with pytest.raises(SystemExit) as error:
        explain.main(words)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_names_of_torchvision_and_ids(monkeypatch):
    assert isinstance(explain.build("squeezenet1_1"), nn.Module)
    assert explain._input("1,3", "int64").dtype == torch.int64
