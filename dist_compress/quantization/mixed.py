"""Mixed precision: how much each weight suffers from few bits, and which get how many within a budget of bytes.

A weight's sensitivity to a dtype is by how much the loss of the float model rises on training data when that weight
alone is quantized, as in the partial quantization of Wu et al. 2020, arXiv:2004.09602; the rises of several weights are
taken to add up. What is chosen is a multiple-choice knapsack: from the narrowest dtypes on, the step that saves most
loss for a byte, along the convex hull of each weight, then whatever still fits. Losses, and so the choice, are the same
on every rank and at any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.quantization import dtypes
from dist_compress.quantization.dtypes import QuantDtype
from dist_compress.quantization.fake_quant import FakeQuantize
from dist_compress.quantization.setting import Setting
from dist_compress.quantization.weights import Weights
from dist_compress.schema import MixedConfig

Row = dict[str, Any]
KEY = "quantization.mixed"


class Mixed:
    """The candidates of a run, what was measured of them, and the choice. The same on every rank."""

    def __init__(
        self, config: MixedConfig, settings: Sequence[Setting], parameters: Mapping[str, FakeQuantize],
        context: Context, reduced: bool,
    ) -> None:  # fmt: skip
        """`parameters`: by their paths. Those whose dtype the user has set keep it. `reduced`: int8 has 7 bits. Raises
        UserError."""
        self.config, self.parameters, self.context = config, parameters, context
        self.rows: list[Row] = []  # {name, quant_dtype, loss, bytes, chosen} of each weight and candidate
        self.candidates: dict[str, list[QuantDtype]] = {}
        if not config.candidates:
            if config.at_most.bytes is not None:
                raise UserError(f"{KEY}.at_most.bytes={config.at_most.bytes}: set {KEY}.candidates, e.g. [int4, int8].")
            return
        for name in config.candidates:
            if name not in dtypes.DTYPES or dtypes.DTYPES[name].is_binary:
                known = ", ".join(n for n, dtype in dtypes.DTYPES.items() if not dtype.is_binary)
                raise UserError(f"{KEY}.candidates={name!r}: no such choice. Available: {known}.")
        if context.evaluate is None:
            raise UserError(f"{KEY}.candidates: nothing measures the model here. Pass evaluate=function(model), or [].")
        for setting in settings:
            if setting.is_activation or "quant_dtype" in setting.sources:
                continue
            if not parameters[setting.path].mixes:
                raise UserError(
                    f"{KEY}.candidates: {setting.said_by('method')} of {setting.name} works with its dtype before "
                    "anything can be measured. Set quant_dtype for it, or choose a method such as ptq."
                )
            names = ["int7" if reduced and name == "int8" else name for name in dict.fromkeys(config.candidates)]
            self.candidates[setting.path] = [
                dtypes.find(name, setting.quant_scheme, f"{KEY}.candidates for {setting.name}") for name in names
            ]
        if not self.candidates:
            raise UserError(f"{KEY}.candidates: quant_dtype is set for every weight. Leave it out where bits are open.")

    def choose(self, weights: Weights) -> list[str]:
        """Measure, and give each weight its dtype if there is a budget. Nothing is quantized yet. Lines for the user.
        Collective."""
        if not self.candidates:
            return []
        before = self._loss()
        if not math.isfinite(before):
            raise UserError(f"{KEY}: the loss of the float model on training data is {before}. Look at it first.")
        rises: dict[str, list[float]] = {}
        for path, candidates in self.candidates.items():
            first = self.parameters[path].spec
            rises[path] = []
            for dtype in candidates:
                self.parameters[path].spec = replace(first, dtype=dtype)
                rises[path].append(self._loss_with(path, weights) - before)
            self.parameters[path].spec = first
        sizes = {path: [self._bytes(path, d) for d in found] for path, found in self.candidates.items()}
        self.rows = [
            {"name": path, "quant_dtype": dtype.name, "loss": rise, "bytes": size, "chosen": False}
            for path, found in self.candidates.items()
            for dtype, rise, size in zip(found, rises[path], sizes[path], strict=True)
        ]
        if self.config.at_most.bytes is None:
            return [f"sensitivity of {len(rises)} weights measured; {KEY}.at_most.bytes would choose among them"]
        fixed = sum(self._bytes(p, q.spec.dtype) for p, q in self.parameters.items() if p not in self.candidates)
        budget = self._budget()
        least = sum(min(found) for found in sizes.values()) + fixed
        if least > budget:
            raise UserError(
                f"{KEY}.at_most.bytes={self.config.at_most.bytes:g} is {budget:,} bytes, but with the narrowest "
                f"candidates the quantized parameters have {least:,}. Raise it, or add a narrower candidate."
            )
        chosen = dict(zip(rises, select(list(sizes.values()), list(rises.values()), budget - fixed), strict=True))
        for path, number in chosen.items():
            own = [row for row in self.rows if row["name"] == path]
            own[number]["chosen"] = True
        self.apply()
        reached = sum(sizes[path][number] for path, number in chosen.items()) + fixed
        names = [self.candidates[path][number].name for path, number in chosen.items()]
        counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
        return [f"mixed precision: {counts}; {reached:,} of at most {budget:,} bytes"]

    def apply(self) -> None:
        """Give the weights what was chosen."""
        for row in self.rows:
            if row["chosen"]:
                quantizer = self.parameters[row["name"]]
                found = next(d for d in self.candidates[row["name"]] if d.name == row["quant_dtype"])
                quantizer.spec = replace(quantizer.spec, dtype=found)

    def _loss_with(self, path: str, weights: Weights) -> float:
        """Of the float model with this one parameter quantized."""
        projection = self.context.projection
        projection.restore()
        self.parameters[path].fit(weights.whole(path))
        projection.add(path, "quant", weights.compressing(path))
        loss = self._loss()
        projection.restore()
        projection.remove(path, "quant")
        return loss

    def _loss(self) -> float:
        """Of the model as it is now. Collective."""
        assert self.context.evaluate is not None, "checked at the start"
        return float(self.context.evaluate(self.config.samples)["loss"])

    def _budget(self) -> int:
        """In bytes."""
        asked = self.config.at_most.bytes
        assert asked is not None
        floats = sum(4 * self._num_elements(path) for path in self.parameters)
        return int(asked * floats) if asked <= 1 else int(asked)

    def _bytes(self, path: str, dtype: QuantDtype) -> int:
        return -(-self._num_elements(path) * dtype.bits // 8) + 4 * self.parameters[path].scale.numel()

    def _num_elements(self, path: str) -> int:
        return math.prod(self.parameters[path].shape)


def select(sizes: Sequence[Sequence[int]], rises: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Of each weight the number of a candidate: sizes sum up to at most `budget`, rises to little.

    Local and pure. The narrowest candidates must fit. The sum is above the least possible by no more than what the
    first step that did not fit would have saved.
    """
    chosen = [min(range(len(s)), key=lambda i, s=s, r=r: (s[i], r[i])) for s, r in zip(sizes, rises, strict=True)]
    left = budget - sum(s[i] for s, i in zip(sizes, chosen, strict=True))
    steps = []
    for weight, (size, rise) in enumerate(zip(sizes, rises, strict=True)):
        at = chosen[weight]
        while better := [i for i in range(len(size)) if size[i] > size[at] and rise[i] < rise[at]]:
            gain = {i: (rise[at] - rise[i]) / (size[i] - size[at]) for i in better}
            best = max(better, key=lambda i: (gain[i], size[i]))  # noqa: B023 - called at once
            steps.append((-gain[best], weight, best))
            at = best
    stuck: set[int] = set()
    for _, weight, to in sorted(steps):  # within a weight the gain of a byte falls: they are in order
        cost = sizes[weight][to] - sizes[weight][chosen[weight]]
        if weight in stuck or cost > left:
            stuck.add(weight)
            continue
        chosen[weight], left = to, left - cost
    while True:  # what still fits, the largest saving first
        found = [
            (rise[i] - rise[at], weight, i)
            for weight, (size, rise, at) in enumerate(zip(sizes, rises, chosen, strict=True))
            for i in range(len(size))
            if size[i] - size[at] <= left and rise[i] < rise[at]
        ]
        if not found:
            return chosen
        _, weight, to = min(found)
        left -= sizes[weight][to] - sizes[weight][chosen[weight]]
        chosen[weight] = to
