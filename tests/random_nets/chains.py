"""Plain chains of layers, for which what has to go can be said in one line each: nothing more and nothing less goes."""

from __future__ import annotations

import random

import torch
from torch import nn

from dist_compress import speedup
from dist_compress.speedup import apply


def check_chain(seed: int) -> int:
    """The number of hidden units that went; raises AssertionError naming the seed if they are not the expected ones.

    A unit between two layers goes if and only if its row and bias (and the affine of its norm) are masked, or the
    columns of the next layer are.
    """
    rng = random.Random(f"chain {seed}")
    torch.manual_seed(seed)
    images = rng.random() < 0.5
    widths = [rng.randint(3, 8) for _ in range(rng.randint(3, 5))]
    layers: list[nn.Module] = []
    expected: dict[str, list[int]] = {}
    dead: list[int] = []  # units that the next layer does not read
    for i, (into, out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        kernel = rng.choice((1, 3)) if images else 1
        name = str(len(layers))
        layer = nn.Conv2d(into, out, kernel, padding=kernel // 2) if images else nn.Linear(into, out)
        with torch.no_grad():
            layer.weight[:, dead] = 0
        layers.append(layer)
        if i == len(widths) - 2:
            break
        units = [rng.choice(("alive", "alive", "row", "column")) for _ in range(out)]
        units[rng.randrange(out)] = "alive"
        expected[f"{name}.weight"] = [u for u in range(out) if units[u] == "alive"]
        rows, dead = ([u for u in range(out) if units[u] == how] for how in ("row", "column"))
        affine = [layer]
        if rng.random() < 0.5:
            layers.append(nn.BatchNorm2d(out) if images else nn.BatchNorm1d(out))
            nn.init.uniform_(layers[-1].weight, 0.5, 1.5)
            nn.init.normal_(layers[-1].bias)
            affine.append(layers[-1])
        with torch.no_grad():
            for module in affine:
                module.weight[rows], module.bias[rows] = 0, 0
        layers.append(rng.choice((nn.ReLU(), nn.GELU(), nn.Tanh(), nn.SiLU(), nn.LeakyReLU())))
    net = nn.Sequential(*layers).double().eval()
    x = torch.randn(2, widths[0], *((4, 4) if images else ())).double()
    plan = speedup.plan(net, (x,))
    for name, left in expected.items():
        kept = plan.keep.get(name, {}).get(0, torch.arange(net.get_parameter(name).shape[0])).tolist()
        assert kept == left, f"check_chain({seed}): {name} keeps {kept} instead of {left}\n{net}"
    before = net(x)
    small = apply(net, plan)
    assert speedup.verify(before, small(x)) < 1e-9, f"check_chain({seed}): masked and shrunk differ"
    return sum(widths[1:-1]) - sum(map(len, expected.values()))
