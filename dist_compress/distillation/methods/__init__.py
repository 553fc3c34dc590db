"""One file is one distillation method."""
