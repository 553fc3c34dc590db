"""Whether the CPU multiplies int8 exactly: without dot products x86 adds pairs of products in 16 bits, which overflow.

Weights of 7 bits cannot overflow them ("reduced range", as ONNX Runtime's documentation advises for such CPUs).
"""

from __future__ import annotations

import platform
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm"}


def needs_reduced_range() -> bool:
    """Of this machine. Local."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return _INFO.is_file() and not dot_products()


def dot_products() -> list[str]:
    """The flags of this machine that promise dot products of int8. Local."""
    return sorted(flags(_INFO.read_text()) & _DOT_PRODUCTS) if _INFO.is_file() else []


def flags(cpuinfo: str) -> set[str]:
    """Of the first processor of a /proc/cpuinfo."""
    lines = [line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]  # x86, Arm
    return set(lines[0].partition(":")[2].split()) if lines else set()
