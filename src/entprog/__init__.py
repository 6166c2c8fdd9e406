"""entprog: train the blocks of a video diffusion model that matter, and let the others cost nothing."""

from entprog.blocks import Block, find_blocks
from entprog.bypass import fidelity
from entprog.cei import Scores, Stop
from entprog.checkpointing import checkpoint_blocks
from entprog.modes import set_active, skip
from entprog.parallel import data_parallel, fully_sharded
from entprog.plan import cost_aware, plan
from entprog.plugin import EntProg
from entprog.priority import score
from entprog.schedule import Candidate
from entprog.strategy import Progressive
from entprog.tokens import Tokens, shrinker

__version__ = "0.1.0"

__all__ = [
    "Block",
    "Candidate",
    "EntProg",
    "Progressive",
    "Scores",
    "Stop",
    "Tokens",
    "checkpoint_blocks",
    "cost_aware",
    "data_parallel",
    "fidelity",
    "find_blocks",
    "fully_sharded",
    "plan",
    "score",
    "set_active",
    "shrinker",
    "skip",
]
