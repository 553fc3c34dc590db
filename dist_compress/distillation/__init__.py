"""Distillation: a student trained towards what a teacher says."""

from dist_compress.distillation.distiller import Distiller, build
from dist_compress.distillation.stored import stored_views, write_store
from dist_compress.distillation.targets import wanted

__all__ = ["Distiller", "build", "stored_views", "wanted", "write_store"]
