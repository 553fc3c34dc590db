"""One file per method: a dataclass `Options` and one subclass of `dist_compress.pruning.metric.Metric`."""
