"""The job on a named or stored data set, seed by seed: split, original, methods, noise floor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from dau_fast.config import PruneConfig, SplitConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.progress import Progress, silent
from dau_fast.data.split import TEST, TRAINING, VALIDATION, Forget, Split, hold_out, make_split
from dau_fast.engine.chance import derive_seed
from dau_fast.engine.device import run_flushed
from dau_fast.engine.runtime import Runtime
from dau_fast.job.assembly import Outcome, carry_out, measure_model
from dau_fast.job.keeping import Keeper
from dau_fast.job.tuning import Tuning
from dau_fast.methods import original, retrain
from dau_fast.methods.method import Method
from dau_fast.methods.running import run_timed
from dau_fast.methods.task import Task
from dau_fast.metrics.unlearning import avg_gap
from dau_fast.models import Classifier
from dau_fast.prune import Masks


@dataclass(frozen=True)
class Checkpoint:
    """A given original, and the role every image had in its training, int8 [N], if it is known.

    masks: of a pruned one, where its file holds them. sha256: of its file. guessed: whether nobody knows what
    it was trained on, so that images which runs hold out may be among it.
    """

    model: Classifier
    roles: np.ndarray | None
    masks: Masks | None = None
    sha256: str | None = None
    guessed: bool = False


@dataclass(frozen=True)
class Experiment:
    """What all seeds of a run share. seed: the first one. fresh: see Task.

    asked: settings by method, whole or some fields. recipe: of the original. pruning: of the original, a
    given one included; None leaves it as it is. trials: of every method that has a space of settings, on the
    first seed; the others run what was chosen there. skip_unfit, keeper: as in `carry_out`. normalised_by:
    whose mean and standard deviation the images are normalised with.
    """

    images: Images
    forget: Forget
    methods: tuple[Method[Any], ...]
    fresh: Callable[[int], Classifier]
    recipe: TrainingRecipe
    asked: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    repeats: int = 1
    shares: SplitConfig = field(default_factory=SplitConfig)
    checkpoint: Checkpoint | None = None
    pruning: PruneConfig | None = None
    runtime: Runtime = field(default_factory=Runtime)
    trials: int = 0
    skip_unfit: bool = False
    keeper: Keeper | None = None
    normalised_by: str = "the data set"

    @property
    def guessed(self) -> bool:
        """Whether images are held out that the original may have been trained on."""
        return self.checkpoint is not None and self.checkpoint.guessed and self.images.validation is None

    def draw_roles(self, seed: int) -> np.ndarray:
        """The role of every image, int8 [N]; a given original keeps the ones it was trained with.

        What is asked to be forgotten is never held out by a draw, nor does it stay so from an earlier one.
        """
        given = self.checkpoint
        asked = self.forget.indices or ()
        if given and given.roles is not None:
            return _take_back(given.roles, asked, self.images) if given.guessed else given.roles
        return hold_out(
            self.images.labels,
            self.images.test,
            self.seed if given else seed,
            validation_share=self.shares.validation_share,
            test_share=self.shares.test_share,
            keep=asked,
            validation=self.images.validation,
        )


def _take_back(roles: np.ndarray, asked: Sequence[int], images: Images) -> np.ndarray:
    """`roles` int8 [N] with those of `asked` in training that an earlier run drew to be held out."""
    taken = roles.copy()
    drawn = [index for index in asked if index < len(roles) and roles[index] in (VALIDATION, TEST)]
    official = [part.tolist() for part in (images.test, images.validation) if part is not None]
    taken[sorted(set(drawn).difference(*official))] = TRAINING
    return taken


@dataclass(frozen=True)
class SeedResult:
    """One seed's outcome. roles: of every image, int8 [N].

    retraining_gap: avg gap between two retrainings, None where there was one at most. guessed: see
    Experiment.
    """

    seed: int
    roles: np.ndarray
    outcome: Outcome
    retraining_gap: float | None
    guessed: bool = False

    @property
    def split(self) -> Split:
        return self.outcome.task.split

    @property
    def history(self) -> dict[str, Any] | None:
        """Of the game, where it was played."""
        game = self.outcome.finished.get("dau")
        return game.history if game else None

    @property
    def tunings(self) -> dict[str, Tuning]:
        """By method that was tuned with this seed."""
        return self.outcome.tunings

    @property
    def networks(self) -> dict[str, nn.Module]:
        """By method, the original first."""
        return {name: model.network for name, model in self.outcome.models.items()}


def run_experiment(experiment: Experiment, progress: Progress = silent) -> list[SeedResult]:
    """Every seed's result. From two repeats on there is a second retraining a seed, for the noise floor."""
    first, twice = experiment.seed, experiment.repeats > 1
    results: list[SeedResult] = []
    for seed in range(first, first + experiment.repeats):
        results.append(run_seed(experiment, seed, twice=twice, progress=progress))
        experiment = _keep_tuned(experiment, results[0].outcome)
    return results


def _keep_tuned(experiment: Experiment, outcome: Outcome) -> Experiment:
    """`experiment` with the settings that tuning chose, for further seeds."""
    chosen = {name: outcome.settings[name] for name in outcome.tunings}
    return replace(experiment, trials=0, asked={**experiment.asked, **chosen})


def run_seed(
    experiment: Experiment, seed: int, *, twice: bool = False, progress: Progress = silent
) -> SeedResult:
    """Run every method with `seed`. twice: retrain a second time for the noise floor."""
    roles = experiment.draw_roles(seed)
    task = make_task(experiment, roles, seed, progress)
    given, pruning = experiment.checkpoint, experiment.pruning
    make_original = None
    if pruning or not given:
        make_original = original.prune_trained if given else original.train
    outcome = carry_out(
        task,
        experiment.methods,
        experiment.asked,
        make_original,
        trials=experiment.trials,
        skip_unfit=experiment.skip_unfit,
        keeper=experiment.keeper,
    )
    gap = None
    if twice and "retrain" in outcome.measures:
        gap = run_flushed(partial(_retraining_gap, outcome, experiment.keeper), experiment.runtime.device)
    return SeedResult(seed, roles, outcome, gap, experiment.guessed)


def make_task(experiment: Experiment, roles: np.ndarray, seed: int, progress: Progress = silent) -> Task:
    """The task of `seed`, its original not trained yet where none was given."""
    images, given = experiment.images, experiment.checkpoint
    split = make_split(roles, images.labels, experiment.forget, seed).to(images.device)
    start = given.model if given else experiment.fresh(derive_seed(seed, "original"))
    if given and experiment.pruning:
        start = copy.deepcopy(start)  # pruned in place, and dense again for the next seed
    return Task(
        images,
        split,
        seed,
        start,
        experiment.fresh,
        experiment.recipe,
        progress,
        given.masks if given else None,
        experiment.pruning,
        experiment.runtime,
    )


def _retraining_gap(outcome: Outcome, keeper: Keeper | None) -> float:
    task, recipe, name = outcome.task, outcome.settings["retrain"], "retrain again"
    run = partial(run_timed, name, lambda given: retrain.unlearn_again(given, recipe), task)
    again = keeper.finish(name, task, recipe, run) if keeper else run()
    return avg_gap(measure_model(again.model, task), outcome.measures["retrain"])
