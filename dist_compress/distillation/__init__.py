"""Distillation: a student trained towards what a teacher says."""
