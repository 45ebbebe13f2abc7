"""The state space rule of Mamba-2 with a tape: replay an accepted prefix onto the old state.

The outputs of a block are mlx-lm's own business (see `draftloom.adapters.recurrent`); what is
needed here is the way back. :mod:`.reference` is the rule written to be read.
"""

from .array import replay, tape_of
from .orders import ORDERS, Order, block, stepwise
from .tape import SsmTape, concat_tapes

__all__ = [
    "ORDERS",
    "Order",
    "SsmTape",
    "block",
    "concat_tapes",
    "replay",
    "stepwise",
    "tape_of",
]
