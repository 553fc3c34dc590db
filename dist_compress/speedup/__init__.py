"""Exact physical shrinking: what is dead, what has to stay, and the smaller model in the user's own modules."""

from dist_compress.speedup.apply import apply, apply_to_state
from dist_compress.speedup.capture import Capture, capture
from dist_compress.speedup.compare import difference
from dist_compress.speedup.cost_table import GroupCost, cost_table
from dist_compress.speedup.coupling import coupling, mask_units
from dist_compress.speedup.custom import register_op, registered, unregister_op
from dist_compress.speedup.explain import Ties, Why, explain, explain_group
from dist_compress.speedup.one_liners import Barrier, Bilinear, Movement, PassThrough, Pointwise
from dist_compress.speedup.plan import Blocked, Plan
from dist_compress.speedup.planning import plan
from dist_compress.speedup.rule import Rule
from dist_compress.speedup.settings import Settings
from dist_compress.speedup.shards import apply_to_shard
from dist_compress.speedup.whole import Report, speedup
from dist_compress.tracing import concrete_trace
from dist_compress.tracing.verify import verify

__all__ = [
    "Barrier",
    "Bilinear",
    "Blocked",
    "Capture",
    "GroupCost",
    "Movement",
    "PassThrough",
    "Plan",
    "Pointwise",
    "Report",
    "Rule",
    "Settings",
    "Ties",
    "Why",
    "apply",
    "apply_to_shard",
    "apply_to_state",
    "capture",
    "concrete_trace",
    "cost_table",
    "coupling",
    "difference",
    "explain",
    "explain_group",
    "mask_units",
    "plan",
    "register_op",
    "registered",
    "speedup",
    "unregister_op",
    "verify",
]
