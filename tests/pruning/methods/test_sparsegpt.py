"""SparseGPT against optimal brain surgery written out: what is left of H is inverted anew for each column."""

import pytest
import torch
from pruning_nets import NUM_MICRO, attach, config
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.pruning.metric import build_metric
from dist_compress.target import Coupling

ONE_STEP = {"name": "one_shot", "end": "1steps"}


def surgery(weight, hessian, number, pattern=None, block_size=128, dampening=0.01, gone=None):
    """(weights, removed), one column at a time: `number` of all, or of each `pattern` consecutive weights."""
    w, columns = weight.double().clone(), weight.shape[1]
    gone = torch.zeros_like(w, dtype=torch.bool) if gone is None else gone
    w[gone] = 0
    h = hessian + dampening * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    left, chosen = number, gone.clone()
    inverses = [torch.linalg.inv(h[c:, c:]) for c in range(columns)]
    for c in range(columns):
        width = pattern or min(block_size, columns - c)
        if c % (pattern or block_size) == 0:
            part = slice(c, c + width)
            # in a block all are ranked by the weights at its start; of a pattern by those when its turn comes
            error = w[:, part].square() / torch.stack([inverses[k][0, 0] for k in range(c, c + width)])
            error[gone[:, part]] = -1
            if pattern:
                chosen[:, part] = torch.zeros_like(gone[:, part]).scatter_(1, error.argsort(1)[:, :number], True)
            else:
                later = int(gone[:, c + width :].sum())
                count = min(max(left * width // (columns - c), int(gone[:, part].sum())), left - later)
                flat = torch.zeros(error.numel(), dtype=torch.bool)
                flat[error.flatten().argsort()[:count]] = True
                chosen[:, part], left = flat.view(error.shape), left - count
        error = w[:, c] * chosen[:, c] / inverses[c][0, 0]
        w[:, c:] -= error[:, None] * inverses[c][0]
        w[:, c][chosen[:, c]] = 0
    return w, chosen


def inputs_of(features, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator) / features**0.5 + 0.5 * torch.eye(features)
    return torch.randn(tokens, features, generator=generator) @ mixed


@pytest.mark.parametrize(("block_size", "pattern", "number"), [(128, None, 60), (5, None, 77), (3, 4, 2), (128, 4, 3)])
@pytest.mark.parametrize("before", [False, True])
def test_it_is_optimal_brain_surgery(block_size, pattern, number, before):
    x, weight = inputs_of(12).double(), torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    metric = build_metric("sparsegpt", {"block_size": block_size}, "pruning")
    statistic = metric.input_statistic(x[None])[0]
    assert torch.equal(statistic, x.T @ x)
    gone = torch.zeros(10, 12, dtype=torch.bool)
    if before:
        gone[::3, 5] = gone[2, 8:10] = True
    run = pattern or weight.numel()
    got, removed = metric.solve(weight, statistic, gone, number, run)
    size = block_size if pattern is None else max(block_size // pattern, 1) * pattern
    want, chosen = surgery(weight, statistic, number, pattern, size, gone=gone)
    assert torch.equal(removed, chosen) and bool(removed[gone].all())
    assert int(removed.sum()) == (number if pattern is None else number * weight.numel() // pattern)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
    assert torch.equal(got == 0, removed)


def damage(x, before, after):
    return float((x @ (before - after).double().T).square().sum())


def test_the_others_make_up_for_what_goes():
    """Worse than the best that any weights can do behind the same mask, better than leaving the others as they are."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(600, 20, generator=generator).double() @ torch.randn(20, 48, generator=generator).double()
    x, weight = few + inputs_of(48, 600), torch.randn(8, 48, generator=generator).double()  # features that go together
    metric = build_metric("sparsegpt", {}, "pruning")
    got, removed = metric.solve(weight, x.T @ x, torch.zeros(8, 48, dtype=torch.bool), 4 * 48, 8 * 48)
    best = torch.zeros_like(weight)
    for row, (target, mask) in enumerate(zip(weight, ~removed, strict=True)):
        best[row, mask] = torch.linalg.lstsq(x[:, mask], x @ target).solution
    alone = damage(x, weight, weight.masked_fill(removed, 0))
    assert damage(x, weight, best) <= damage(x, weight, got) < 0.6 * alone
    scores = weight.abs() * x.square().sum(0).sqrt()
    wanda = torch.zeros_like(removed).scatter_(1, scores.argsort(1)[:, :24], True)
    assert damage(x, weight, got) < 0.6 * damage(x, weight, weight.masked_fill(wanda, 0))


def test_a_feature_that_is_always_zero_goes_first():
    x, weight = inputs_of(6).double(), torch.full((4, 6), 2.0)
    x[:, 2] = 0
    metric = build_metric("sparsegpt", {}, "pruning")
    got, removed = metric.solve(weight, x.T @ x, torch.zeros(4, 6, dtype=torch.bool), 4, 24)
    assert (
        removed[:, 2].all()
        and int(removed.sum()) == 4
        and torch.equal(got[:, [0, 1, 3, 4, 5]], torch.full((4, 5), 2.0))
    )


class Layers(nn.Module):
    """Layers of every kind side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv1d = nn.Linear(8, 6), Conv1D(6, 8)
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)
        self.groups = nn.Conv2d(8, 6, 2, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 8, 6, 6]
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        return self.linear(tokens).sum() + self.conv1d(tokens).sum() + self.conv(x[:, :4]).sum() + self.groups(x).sum()


def samples(micro):
    return torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(micro))


def solved(entries, model, drift=False, options=None, num_micro=NUM_MICRO):
    pruner, _, projection = attach(
        config(entries, method="sparsegpt", schedule=ONE_STEP, options=options or {}), model, Coupling()
    )
    for micro in range(comm.rank(), NUM_MICRO, comm.world_size()):
        model(samples(micro)).backward()
        pruner.after_backward(0, micro)
    if drift and comm.rank() == 1:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    pruner.before_step(0)
    comm.calls.clear()
    pruner.after_step(0)
    return pruner, projection, dict(comm.calls)


@pytest.mark.parametrize("granularity", ["default", "2:4"])
def test_every_kind_of_layer_is_solved_as_the_matrix_it_is(granularity):
    model, before = Layers(), Layers()
    entries = [{"op_names": ["linear", "conv1d", "conv", "groups"], "granularity": granularity}]
    pruner, projection, _ = solved(entries, model)
    x = torch.cat([samples(micro) for micro in range(NUM_MICRO)]).double()
    tokens = x.flatten(2).transpose(1, 2).flatten(0, 1)

    def patches(channels, layer):  # [tokens, places of the kernel * channels], channels fastest
        cut = F.unfold(channels, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        return cut.view(len(x), channels.shape[1], -1, cut.shape[2]).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)

    cases = [
        ("linear", [tokens], [before.linear.weight]),
        ("conv1d", [tokens], [before.conv1d.weight.T]),
        ("conv", [patches(x[:, :4], before.conv)], [before.conv.weight.movedim(1, -1).flatten(1)]),
        ("groups", [patches(half, before.groups) for half in x.split(4, 1)],
         list(before.groups.weight.movedim(1, -1).flatten(1).split(3))),
    ]  # fmt: skip
    masks = pruner.masks()
    for name, inputs, weights in cases:
        parts = []
        for seen, weight in zip(inputs, weights, strict=True):
            number = 2 if granularity == "2:4" else weight.numel() // 2
            pattern = 4 if granularity == "2:4" else None
            parts.append(surgery(weight.detach(), seen.T @ seen, number, pattern))
        latent, mask = projection.latent(f"{name}.weight"), masks[f"{name}.weight"]
        if name == "conv1d":
            latent, mask = latent.T, mask.T
        elif name != "linear":
            latent, mask = latent.movedim(1, -1).flatten(1), mask.movedim(1, -1).flatten(1)
        assert torch.equal(~mask, torch.cat([gone for _, gone in parts])), name
        torch.testing.assert_close(latent, torch.cat([w for w, _ in parts]).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.linear.bias, before.linear.bias)


ALL = [{"op_names": ["linear", "conv1d", "conv", "groups"]}]


def bits(drift):
    model = Layers()
    pruner, _, calls = solved(ALL, model, drift)
    weights = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "weight" in n])
    return pruner.history, weights, calls


def test_equal_bits_at_any_number_of_ranks_and_of_replicas_that_drifted(ranks):
    history, weights, _ = ranks(1, bits, False)[0]
    for size in (2, 3, 4):
        for other, found, calls in ranks(size, bits, False):
            assert other == history and torch.equal(found, weights)
            assert calls["broadcast"] == 4 and calls["ordered_sum"] == 4  # of each layer, when it is decided
    (first, a, _), (second, b, _) = ranks(2, bits, True)
    assert first == second and torch.equal(a, b)


def broken():
    model = Layers()
    with torch.no_grad():
        model.conv1d.weight[0, 0] = torch.nan
    try:
        solved(ALL, model)
    except UserError as error:
        return str(error)
    return ""


def test_a_layer_without_a_solution_stops_every_rank(ranks):
    for size in (1, 2, 3):
        assert all(said.startswith("conv1d: weights or inputs are no finite") for said in ranks(size, broken))
    few = Layers()
    with pytest.raises(UserError, match="conv: .*[Cc]holesky.* Raise the dampening"):
        few.conv.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
        solved([{"op_names": ["conv"]}], few, options={"dampening": 0.0})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"global_group_id": 1}, "global_group_id=.* exclude each other: sparsegpt solves each layer by itself"),
        ({"sparse_threshold": 0.1}, "sparse_threshold=0.1 exclude each other"),
        ({"granularity": [2, 2]}, "sparsegpt decides single weights"),
        ({"granularity": "out_channel"}, "needs `unit_scores`"),
        ({"target_names": ["bias"]}, "this is the bias of a Linear"),
        ({"options": {"dampening": -1.0}}, "options.dampening=-1.0 must not be negative"),
        ({"options": {"block_size": 0}}, "options.block_size=0 must be at least 1"),
    ],
)
def test_refusals(entry, said):
    with pytest.raises(UserError, match=said):
        entries = [{"op_names": ["linear"], "method": "sparsegpt", **entry}]
        attach(config(entries, schedule=ONE_STEP), Layers(), Coupling())
