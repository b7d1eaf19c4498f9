"""What unlearning costs, predicted: seconds and memory from sizes, and from constants of the machine.

`count_work` counts what one game does, to its last turn; `fit_machine` finds a machine's constants in
measured runs, `predict` multiplies the two, and `what_breaks_first` says how far the sets may grow.
`count_equivalents` needs no machine: it counts passes, the game's beside those of retraining.
"""

from dau_fast.cost.equivalents import Equivalents, count_equivalents
from dau_fast.cost.fit import CONSTANTS, Cost, Machine, count_units, fit_machine, predict
from dau_fast.cost.memory import (
    Breaking,
    count_memory,
    count_training_memory,
    predict_memory,
    what_breaks_first,
)
from dau_fast.cost.network import Network, count_network, has_batchnorm
from dau_fast.cost.passes import Passes, count_passes
from dau_fast.cost.rivals import COUNTS, Sizes, count_rival
from dau_fast.cost.work import Job, Work, count_work

__all__ = [
    "CONSTANTS",
    "COUNTS",
    "Breaking",
    "Cost",
    "Equivalents",
    "Job",
    "Machine",
    "Network",
    "Passes",
    "Sizes",
    "Work",
    "count_equivalents",
    "count_memory",
    "count_network",
    "count_passes",
    "count_rival",
    "count_training_memory",
    "count_units",
    "count_work",
    "fit_machine",
    "has_batchnorm",
    "predict",
    "predict_memory",
    "what_breaks_first",
]
