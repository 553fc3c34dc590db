"""report.html: the run on one page that needs no network, no script and no other file. Light and dark.

Everything shown comes from the arguments; what a figure means is in docs/report.md.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from markupsafe import Markup

from dist_compress.reporting import charts, figures, pictures, quantized_pictures
from dist_compress.reporting.quantized import candidate, quantized_tensor

Row = Mapping[str, Any]
CHART = "coupling.svg"  # in the folder of a run: shown where it exists

# Series are drawn together when their last name is the same; these come first, the others are folded away.
_CURVES = {
    "loss": ("Loss", {}),
    "accuracy": ("Accuracy", {"show": "{:.0%}".format}),
    "perplexity": ("Perplexity", {}),
    "lr": ("Learning rate", {"from_zero": True}),
    "sparse_ratio": ("Sparse ratio", {"from_zero": True, "steps": True, "show": "{:.0%}".format}),
}


def write_report(
    run_dir: str | Path,
    *,
    config_yaml: str,
    summary: Row,
    layers: Sequence[Row],
    asked_but_kept: Sequence[Row],
    history: Sequence[Row],
    metrics: Sequence[Row],
    decisions: Sequence[Row],
    quantized: Sequence[Row] = (),
    sensitivity: Sequence[Row] = (),
    targets: Sequence[Row] = (),
    kept_channels: Sequence[Row] = (),
    scores: Sequence[Row] = (),
) -> Path:
    """Write `run_dir/report.html` and return its path. Rank 0 only.

    `layers`: {name, before, after, params_before, params_after, macs_before, macs_after}, channels as counts.
    `asked_but_kept`: {name, asked, given, reason}; a float is a ratio removed, an int a number of channels.
    `history`: events {step, text}. `metrics`: rows of metrics.jsonl. `decisions`: {step, ratio, fingerprint}.
    `targets`: {name, unit, num, removed, asked, group, reason}. `kept_channels`: {name, kept}, 1 or 0 for each channel.
    `scores`: {step, name, edges, kept, removed}, a histogram for each decision and group.
    `quantized`: rows of quantization/table.py. `sensitivity`: {name, quant_dtype, loss, bytes, chosen}.
    """
    config = yaml.safe_load(config_yaml) or {}
    loader = jinja2.PackageLoader("dist_compress.reporting", ".")
    strict = jinja2.StrictUndefined
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True)
    page.filters |= {"count": figures.count, "fingerprint": figures.fingerprint, "amount": _amount}
    rows = figures.before_after(summary)
    drawn = pictures.drawn(layers, kept_channels, scores) | quantized_pictures.drawn(quantized, sensitivity)
    chart = Path(run_dir) / CHART
    text = page.get_template("report.html.jinja").render(
        coupling=Markup(chart.read_text(encoding="utf-8")) if chart.is_file() else None,
        title=_title(config) or Path(run_dir).resolve().name,
        subtitle=_subtitle(config, summary),
        date=time.strftime("%d %B %Y, %H:%M"),
        headlines=_headlines(rows),
        rows=rows,
        proof=_proof(config, summary),
        layers=_layers(layers, asked_but_kept),
        curves=_curves(metrics, decisions),
        limits=figures.limits(summary),
        targets=[{**row, **figures.target(row)} for row in targets],
        pictures={name: Markup(d.svg()) for name, d in drawn.items()},
        asked_but_kept=[row for row in asked_but_kept if row["name"] not in {t["name"] for t in targets}],
        decisions=decisions,
        tensors=[quantized_tensor(row) for row in quantized],
        sensitivity=[candidate(row) for row in sensitivity],
        history=[_event(row) for row in history],
        fingerprints=_under("fingerprint", summary),
        environment={**_environment(), **_told_environment(summary)},
        summary={key: json.dumps(summary[key], default=str) for key in sorted(summary)},
        config_yaml=config_yaml,
    )
    file = Path(run_dir) / "report.html"
    draft = file.with_suffix(".html.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)
    return file


def _title(config: Row) -> str:
    names = (figures.source_name(config.get(section) or {}) for section in ("model", "data"))
    return " on ".join(filter(None, names))


def _subtitle(config: Row, summary: Row) -> list[str]:
    pruning = config.get("pruning") or {}
    parts = []
    if pruning.get("method"):
        schedule = (pruning.get("schedule") or {}).get("name")
        parts.append(f"{pruning['method']}" + (f", {schedule} schedule" if schedule else ""))
        if pruning.get("sparse_ratio") is not None:
            currency = {"macs": "MACs", "params": "parameters"}.get(str(pruning.get("compute")), "channels")
            parts.append(f"{figures.percent(pruning['sparse_ratio'], 0)} of the {currency} asked for")
    if "world_size" in summary:
        ranks = "1 rank" if summary["world_size"] == 1 else f"{summary['world_size']} ranks"
        parts.append(", ".join(filter(None, [ranks, summary.get("backend")])))
    return parts


def _headlines(rows: Sequence[figures.Figure]) -> list[figures.Figure]:
    """The figures asked for first: accuracy, MACs unless they stayed, the file of a quantized model or else parameters,
    median latency of the largest batch where the model is to run."""
    by_key = {row.key: row for row in rows}
    medians = [row.key for row in rows if row.key.startswith("latency_ms/p50/")]
    files = [row.key for row in rows if row.key.startswith("file_bytes/")]
    keys = ["accuracy", "macs", *(files[:1] or ["params"]), *medians[-1:]]
    shown = [by_key[key] for key in keys if key in by_key]
    return [row for row in shown if not (files and row.key == "macs" and row.better is None)]


def _proof(config: Row, summary: Row) -> dict[str, Any]:
    """masked == shrunk: the difference that was measured, the one that is allowed, and the verdict."""
    difference = summary.get("verify/max_rel_diff")
    tolerance = summary.get("verify/tolerance", (config.get("speedup") or {}).get("tolerance"))
    masked = summary.get("accuracy/masked")
    shrunk = summary.get("accuracy/shrunk")  # at once after the shrink: before any fine-tuning
    changed = (config.get("speedup") or {}).get("norm") == "plain"  # asked for, so nothing is promised
    return {
        "changed": changed,
        "difference": None if difference is None else f"{difference:.2e}",
        "tolerance": None if tolerance is None or changed else f"{tolerance:.0e}",
        "holds": None if difference is None or tolerance is None or changed else difference <= tolerance,
        "masked": None if masked is None else figures.percent(masked),
        "shrunk": None if shrunk is None else figures.percent(shrunk),
    }


def _layers(layers: Sequence[Row], asked_but_kept: Sequence[Row]) -> list[dict[str, Any]]:
    """Each layer with the share it kept and, where less was removed than asked, the share asked for."""
    asked = {row["name"]: row["asked"] for row in asked_but_kept}
    result = []
    for layer in layers:
        name, before = layer["name"], layer["before"]
        names = (
            name,
            f"{name}.weight",
            f"{name}.weight[dim 0]",
        )  # a module, its tensor, the tensor's outputs
        wish = next((asked[n] for n in names if n in asked), None)
        if isinstance(wish, int) and not isinstance(wish, bool) and before:
            wish = wish / before
        result.append(
            {
                **layer,
                "kept": layer["after"] / before if before else 1.0,
                "asked": 1 - wish if isinstance(wish, float) and 0 <= wish <= 1 else None,
            }
        )
    return result


def _curves(metrics: Sequence[Row], decisions: Sequence[Row]) -> list[dict[str, Any]]:
    """Charts of all series in `metrics`, the familiar ones first: {title, names, svg, main}."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in metrics:
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, int | float):
                last = key.rpartition("/")[2]
                groups.setdefault(last, {}).setdefault(key, []).append((row["step"], value))
    order = [name for name in _CURVES if name in groups] + [name for name in groups if name not in _CURVES]
    end = max((row["step"] for row in metrics), default=0)
    marks = {row["step"]: f"decision at step {row['step']}: {_amount(row.get('ratio'))}" for row in decisions}
    result = []
    for name in order:
        title, options = _CURVES.get(name, (name, {}))
        svg = charts.line_chart(title, groups[name], marks=marks, last_step=end, **options)
        result.append({"title": title, "names": list(groups[name]), "svg": Markup(svg), "main": name in _CURVES})
    return result


def _amount(value: Any) -> str:
    """What was asked or given: a float in [0, 1] is a ratio, an int a count."""
    if isinstance(value, float) and 0 <= value <= 1:
        return figures.percent(value, 1)
    return "" if value is None else figures.number(value)


def _event(row: Row) -> dict[str, Any]:
    extra = [f"{k} {figures.number(v)}" for k, v in row.items() if k not in ("step", "time", "text")]
    return {"step": row.get("step"), "text": ", ".join(filter(None, [str(row.get("text", "")), *extra]))}


def _environment() -> dict[str, str]:
    """Where this page was written: versions and hardware. Local."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical cores",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["gpu"] = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _told_environment(summary: Row) -> dict[str, Any]:
    """What the summary says of the run's surroundings: world_size, backend, all of env/ and versions/."""
    told = {key: summary[key] for key in ("world_size", "backend") if key in summary}
    return {**told, **_under("env", summary), **_under("versions", summary)}


def _under(head: str, summary: Row) -> dict[str, Any]:
    """The entries below `head/`, without it, in order of their names."""
    return {key.partition("/")[2]: summary[key] for key in sorted(summary) if key.startswith(f"{head}/")}
