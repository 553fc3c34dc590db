"""The metric of each target."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dist_compress.pruning.checks import check_method
from dist_compress.pruning.metric import Metric, build_metric
from dist_compress.pruning.setting import Setting


def scorers_of(settings: Sequence[Setting]) -> dict[str, Metric]:
    """{target: its metric}; targets with one method and the same options share it. Raises UserError."""
    built: dict[str, Metric] = {}
    scorers = {}
    for setting in settings:
        if setting.align is not None:
            continue
        name = json.dumps([setting.method, setting.options], sort_keys=True, default=str)
        if name not in built:
            keys = [setting.sources.get(key, "pruning") for key in ("method", "options")]
            built[name] = build_metric(setting.method, setting.options, *keys)
        check_method(setting, built[name])
        scorers[setting.name] = built[name]
    return scorers
