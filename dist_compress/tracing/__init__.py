"""Recording a model: the ATen tape of one real run."""

from dist_compress.tracing.tape import Info, ModuleCall, Op, Ref, Trace
from dist_compress.tracing.trace import TraceError, trace

__all__ = ["Info", "ModuleCall", "Op", "Ref", "Trace", "TraceError", "trace"]
