"""What a run found out, phase by phase, kept in `facts.json` so that a resumed run still has it; then the results.

Only rank 0 measures and writes; the other ranks' calls do nothing. Latencies are taken at the end, dense and small
model turn by turn, on rank 0 alone while the others wait: what else the machine does falls on both alike.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dist_compress import comm, export
from dist_compress.config import Config, to_yaml
from dist_compress.export import onnx
from dist_compress.fingerprint import weights_fingerprint
from dist_compress.method import Method
from dist_compress.quantization import cpu, describe
from dist_compress.quantization.deploy import without_quantizers
from dist_compress.reporting.coupling_chart import coupling_chart
from dist_compress.reporting.records import read
from dist_compress.reporting.report import CHART, write_report
from dist_compress.reporting.reporter import write_summary
from dist_compress.speedup import Plan
from dist_compress.speedup.cost import latencies, layer_costs, macs, num_bytes, num_params, resize_batch
from dist_compress.target import Coupling

BATCH_SIZES = (1, 32)
LATENCY_S = 1.5  # spent on timing both models


class Outcome:
    """The summary of a run as it grows. Every method may be called on every rank; rank 0 acts."""

    def __init__(
        self, config: Config, run_dir: Path, example: Any, resumed: bool, sections: Sequence[str] | None = None
    ) -> None:
        """`sections`: those of the configuration that took part, which the report shows; None: all."""
        self.config, self.run_dir, self.example, self.sections = config, run_dir, example, sections
        self.active = comm.rank() == 0
        self.file = run_dir / "facts.json"
        self.facts: dict[str, Any] = {"summary": {}, "layers": {}, "methods": {}, "kept": []}
        if self.active and resumed and self.file.is_file():
            self.facts = json.loads(self.file.read_text())

    @property
    def summary(self) -> dict[str, Any]:
        return self.facts["summary"]

    def coupled(self, coupling: Coupling, model: nn.Module) -> None:
        """Draw the groups of units, if any, to coupling.svg, which the report shows."""
        if self.active and coupling.groups:
            chart = coupling_chart(coupling, [name for name, _ in model.named_modules()])
            (self.run_dir / CHART).write_text(chart, encoding="utf-8")

    def dense(self, model: nn.Module, example: Any) -> None:
        """What the model costs before the methods put anything into it. `example`: of a call, where the model is."""
        if "params/before" not in self.summary:
            self._measure("before", model, example)

    def before(self, metrics: dict[str, float]) -> None:
        """The dense model as it is when the first change falls."""
        self.became("before", metrics)

    def became(self, when: str, metrics: dict[str, float]) -> None:
        """What the model is right after a change: shrunk, before any fine-tuning; quantized, right after its
        calibration."""
        if self.active:
            self.summary.update({f"{name}/{when}": value for name, value in metrics.items()})
            self._save()

    def compressed(self, methods: Sequence[Method], metrics: dict[str, float]) -> None:
        """The simulated model after the last decision: masked, in its dense shape. Collective, for the methods."""
        results = [method.results() for method in methods]
        if self.active:
            self.summary.update({f"{name}/masked": value for name, value in metrics.items()})
            self.facts["kept"] = []  # what a life of this run noted that was killed before its checkpoint
            for result in results:
                self.facts["kept"] += result.pop("asked_but_kept", [])
                self.facts["methods"].update(result)
            self._save()

    def verified(self, difference: float, plan: Plan) -> None:
        if self.active:
            self.summary["verify/max_rel_diff"] = difference
            self.summary["fingerprint/plan"] = f"{plan.fingerprint():016x}"
            self.facts["kept"] += [
                {"name": f"{b.fqn}[dim {b.dim}]", "asked": b.count, "given": 0, "reason": b.reason}
                for b in plan.blocked
            ]

    def finished(self, results: dict[str, Any]) -> None:
        """What a method says of the model that it leaves."""
        if self.active:
            self.facts["methods"].update(results)

    def after(self, model: nn.Module, metrics: dict[str, float]) -> None:
        """The model that is delivered. What nothing changed on the way is its own `before`."""
        self._measure("after", model, self.example)
        self.became("after", metrics)
        if self.active:
            self.summary.update({f"{k}/before": v for k, v in metrics.items() if f"{k}/before" not in self.summary})
            self.summary["fingerprint/weights"] = weights_fingerprint(model)

    def exported(self, name: str, checked: dict[str, Any]) -> None:
        """`checked`: what the check of a format found."""
        if self.active:
            self.summary.update({f"export/{name}/{key}": value for key, value in checked.items()})
            file = self.run_dir / getattr(export.find(name), "FILE", "")
            if file.is_file():
                self.summary[f"file_bytes/{name}/after"] = file.stat().st_size

    def latencies(self, dense: nn.Module, small: nn.Module) -> None:
        """Rank 0 only. A quantized model is as fast as the file that ONNX Runtime runs, beside that of the float
        `dense`; in PyTorch it is measured where it was pruned as well, without what simulates integers."""
        quantized = describe(small) is not None
        if not quantized or any(key.endswith("/masked") for key in self.summary):
            small = without_quantizers(small) if quantized else small
            self._time("latency_ms/{}", {"before": dense, "after": small})
        if quantized and "onnx" in self.config.export:
            with tempfile.TemporaryDirectory() as folder:
                onnx.export(folder, dense, None, self.config, self.example)
                self.summary["file_bytes/onnx/before"] = (Path(folder) / onnx.FILE).stat().st_size
                files = {"before": folder, "after": self.run_dir}
                runs = {name: onnx.Runtime(Path(path) / onnx.FILE) for name, path in files.items()}
                self._time("latency_ms/{}/onnx", runs)
        if quantized:
            self.summary["env/int8_dot_products"] = ", ".join(cpu.dot_products()) or "none"

    def _time(self, key: str, models: Mapping[str, nn.Module]) -> None:
        args, kwargs = self.example
        sizes = tuple(dict.fromkeys((*BATCH_SIZES, self.config.pruning.latency.batch_size)))
        for name, found in latencies(models, args, kwargs, sizes, LATENCY_S).items():
            for batch, quantiles in found.items():
                for quantile, value in quantiles.items():
                    self.summary[f"{key.format(quantile)}/{name}/{batch}"] = value

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json, with `more` in it, and report.html. Returns the summary. Rank 0 only."""
        self.summary.update(
            {
                **more,
                "world_size": comm.world_size(),
                "backend": self.config.backend.name,
                "verify/tolerance": self.config.speedup.tolerance,
                **{k: v for k, v in self.facts["methods"].items() if k.startswith(("fingerprint/", "verify/"))},
            }
        )
        for row in self.facts["methods"].get("limits", []):
            batch = self.config.pruning.latency.batch_size
            key = f"latency_ms/p50/after/b{batch}" if row["unit"] == "latency_ms" else f"{row['unit']}/after"
            told = {name: row[name] for name in ("asked", "predicted", "binding")} | {"reached": self.summary[key]}
            self.summary.update({f"at_most/{row['unit']}/{name}": value for name, value in told.items()})
        self._save()
        write_summary(self.run_dir, self.summary)
        write_report(
            self.run_dir,
            config_yaml=to_yaml(self.config, self.sections),
            summary=self.summary,
            asked_but_kept=self.facts["kept"],
            history=read(self.run_dir / "events.jsonl"),
            metrics=read(self.run_dir / "metrics.jsonl"),
            decisions=self.facts["methods"].get("decisions", []),
            **self.shown(),
        )
        return self.summary

    def shown(self) -> dict[str, list[dict[str, Any]]]:
        """What pictures and tables show: `layers`, `targets`, `kept_channels`, `scores` of pruning, `quantized` and
        `sensitivity` of quantization."""
        names = ("targets", "kept_channels", "scores", "sensitivity")
        own = {name: self.facts["methods"].get(name, []) for name in names}
        return {"layers": self._layers(), "quantized": self.facts["methods"].get("quantization", []), **own}

    def line(self, when: str) -> str:
        """One line for the console: "before: accuracy 98.33 %, loss 0.0712". "" on other ranks than 0."""
        values = {k.removesuffix(f"/{when}"): v for k, v in self.summary.items() if k.endswith(f"/{when}")}
        shown = [f"{k} {100 * v:.2f} %" if k == "accuracy" else f"{k} {v:.4g}" for k, v in sorted(values.items())]
        return f"{when}: {', '.join(shown)}"

    def _measure(self, when: str, model: nn.Module, example: Any) -> None:
        if not self.active:
            return
        args, kwargs = resize_batch(example, 1)
        self.summary[f"params/{when}"] = num_params(model)
        self.summary[f"macs/{when}"] = macs(model, args, kwargs)
        self.summary[f"file_bytes/{when}"] = num_bytes(model)
        self.facts["layers"][when] = layer_costs(model, args, kwargs)

    def _layers(self) -> list[dict[str, Any]]:
        """Channels, parameters and MACs of each layer that has MACs, before and after."""
        before, after = (self.facts["layers"].get(when, {}) for when in ("before", "after"))
        rows = []
        for name, old in before.items():
            new = after.get(name, old)
            rows.append(
                {
                    "name": name, "before": old["channels"], "after": new["channels"],
                    "params_before": old["params"], "params_after": new["params"],
                    "macs_before": old["macs"], "macs_after": new["macs"],
                }
            )  # fmt: skip
        return rows

    def _save(self) -> None:
        draft = self.file.with_suffix(".part")
        draft.write_text(json.dumps(self.facts, indent=1, default=str) + "\n")
        os.replace(draft, self.file)
