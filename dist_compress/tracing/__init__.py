"""Recording a model: the ATen tape of one real run."""

from dist_compress.tracing.tape import Info, Op, Ref, Trace
from dist_compress.tracing.trace import TraceError, trace

__all__ = ["Info", "Op", "Ref", "Trace", "TraceError", "trace"]
