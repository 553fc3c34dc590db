"""Random small models with random masks, and the law they must obey: masked equals shrunk.

Everything follows from one seed, so that a failure is replayed by `check(seed)`.
"""

from random_nets.check import Broken, Outcome, check, describe
from random_nets.drawing import draw

__all__ = ["Broken", "Outcome", "check", "describe", "draw"]
