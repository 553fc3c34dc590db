"""Recording a model by one real run: its program as a torch.fx graph, or its tape of ATen ops."""

from dist_compress.tracing.recorder import Specialised, concrete_trace
from dist_compress.tracing.tape import Info, ModuleCall, Op, Ref, Trace
from dist_compress.tracing.trace import TraceError, trace

__all__ = ["Info", "ModuleCall", "Op", "Ref", "Specialised", "Trace", "TraceError", "concrete_trace", "trace"]
