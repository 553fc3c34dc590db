"""The gates: chunks of any size, sequences with a mask, every output, NaN."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "quantization"))
from nets import calibrated  # noqa: E402

from dist_compress.export.parts.agreement import check  # noqa: E402
from dist_compress.export.parts.call import chunks, named, outputs  # noqa: E402


class Tagger(nn.Module):
    """Logits [n, tokens, 4] and their sum [n]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 4)

    def forward(self, x, attention_mask=None):
        logits = self.fc(x)
        return {"logits": logits, "pooled": [logits.sum((1, 2)), None]}


@pytest.fixture(scope="module")
def tagger():
    model = Tagger()
    calibrated(model, torch.randn(2, 5, 8), method="ptq").fold()
    return model.eval()


X = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(3))


def altered(model, change):
    def run(call):
        found = outputs(model, call)
        change(found)
        return found

    return run


def test_all_outputs_by_name_in_chunks(tagger):
    assert list(named(tagger(X))) == ["logits", "pooled.0"] and list(named(X)) == ["output"]
    assert [call[0][0].shape[0] for call in chunks(((X,), {"scalar": torch.tensor(1.0)}), 16)] == [16, 16, 8]
    same = check(altered(tagger, lambda found: None), tagger, ((X,), {}), "key", "file")
    assert same == {"max_diff": 0.0, "top1_agreement": 1.0}
    pooled = outputs(tagger, ((X,), {}))["pooled.0"]
    unit = float(pooled.max() - pooled.min()) / 255
    near = check(altered(tagger, lambda f: f["pooled.0"].add_(3 * unit)), tagger, ((X,), {}), "key", "file")
    assert near["max_diff"] == pytest.approx(3, rel=1e-3)
    with pytest.raises(RuntimeError, match="key: the output of file differs by 9 units"):
        check(altered(tagger, lambda f: f["pooled.0"].add_(9 * unit)), tagger, ((X,), {}), "key", "file")


def test_the_top_of_every_token_counts_but_those_masked():
    """Classes 0 and 1 are nearly equal: another top-1 of each last token is within the largest difference."""
    model = Tagger()
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([1.0, 0.99, 0.0, 0.0]))
    calibrated(model, torch.randn(2, 5, 8), method="ptq").fold()
    swapped = altered(model, lambda found: found["logits"][:, -1, :2].copy_(torch.tensor([0.99, 1.0])))
    only_logits = lambda call: {"logits": swapped(call)["logits"]}  # noqa: E731
    mask = torch.ones(40, 5, dtype=torch.long)
    with pytest.raises(RuntimeError, match="agrees in 80.0% of 200 top-1"):
        check(only_logits, model, ((X,), {"attention_mask": mask}), "key", "file")
    mask[:, -1] = 0
    assert check(only_logits, model, ((X,), {"attention_mask": mask}), "key", "file")["top1_agreement"] == 1.0


def test_not_a_number_never_ships(tagger):
    with pytest.raises(RuntimeError, match="must not ship"):
        check(altered(tagger, lambda f: f["logits"][0, 0, 0].fill_(float("nan"))), tagger, ((X,), {}), "key", "file")
    with pytest.raises(RuntimeError, match="must not ship"):
        check(altered(Tagger(), lambda f: f["logits"].fill_(float("nan"))), Tagger(), ((X,), {}), "key", "file")
