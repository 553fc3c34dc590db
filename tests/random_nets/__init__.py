"""Random small models with random masks, and the law they must obey: masked equals shrunk.

Everything follows from one seed, so that a failure is replayed by `check(seed)`.
"""

from random_nets.chains import check_chain
from random_nets.drawing import draw
from random_nets.laws import Broken, Outcome, check, describe

__all__ = ["Broken", "Outcome", "check", "check_chain", "describe", "draw"]
