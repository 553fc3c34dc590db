"""Distillation: a student trained towards what a teacher says."""

from dist_compress.distillation.distiller import Distiller, build

__all__ = ["Distiller", "build"]
