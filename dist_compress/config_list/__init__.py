"""Config lists: which targets of a model are asked for what. Pruning, quantization and distillation share this, and
each gives its keys and its checks (`Noun`)."""

from dist_compress.config_list.defaults import register
from dist_compress.config_list.entry import Entry, is_activation
from dist_compress.config_list.merging import in_model_order, merge, overrides
from dist_compress.config_list.noun import Noun
from dist_compress.config_list.setting import Setting, shown

__all__ = ["Entry", "Noun", "Setting", "in_model_order", "is_activation", "merge", "overrides", "register", "shown"]
