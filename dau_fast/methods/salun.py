"""SalUn: random labels for the forget set, learned by the weights that its loss touches most.

Fan et al. 2024, "SalUn", ICLR 2024, arXiv 2310.12508. Learning rates there are 5e-3 to 1.3e-2, found per
task; the default is that of the authors' example, 10 % of CIFAR-10.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from dau_fast.config import UnlearningRecipe
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import descend
from dau_fast.methods.relabelling import fit_random_labels
from dau_fast.methods.saliency import check_whole_model, hold_others, keep_share, sum_gradients
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class SalUnConfig(UnlearningRecipe):
    """Passes are those over the forget set, each followed by one over the retain set."""

    lr: float = 0.013
    share: float = 0.5  # of the weights, all layers together, that learn

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("share", high=1, open_low=True)


def unlearn(task: Task, config: SalUnConfig) -> Unlearned:
    """Train the salient weights of a copy of the original on random labels; all others stay as they are."""
    model = copy.deepcopy(task.original)
    salient = keep_share(sum_gradients(task, task.split.forget, config.batch_size), config.share, task.masks)
    with task.trainee(model) as trainee:
        optimizer = descend(trainee, task, config)
        hold_others(optimizer, trainee.network, salient)
        return Unlearned(model, fit_random_labels(trainee, optimizer, task, config, "salun"))


METHODS = (
    Method(
        name="salun",
        label="SalUn",
        about="random labels, learned by the half of the weights that the forget set touches most",
        run=unlearn,
        choose=recipe_chooser(lambda task: SalUnConfig()),
        check=check_whole_model,
        space={
            "lr": (1e-3, 5e-3, 0.013, 0.03, 0.1),
            "epochs": (2, 5, 10, 20),
            "share": (0.1, 0.3, 0.5, 0.7, 0.9),
        },
    ),
)
