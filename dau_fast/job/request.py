"""A run as it is asked for on the command line, and the experiment that this makes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dau_fast import checkpoints
from dau_fast.config import (
    RETRAIN_RECIPES,
    PruneConfig,
    SplitConfig,
    TrainingRecipe,
    change,
    fast_recipe,
    split_config,
    training_recipe,
)
from dau_fast.data import named
from dau_fast.data.images import Images
from dau_fast.data.progress import Progress
from dau_fast.data.split import Forget, decode_roles
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError, check_choice
from dau_fast.job.assembly import match_precision, network_builder
from dau_fast.job.experiment import Checkpoint, Experiment
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.prune.registry import get_pruner


@dataclass(frozen=True)
class Request:
    """Every field is an option of the command line, which explains it; None where nothing was asked for.

    settings: by method, and by "original", "split" and "prune": fields that replace the usual ones, where
    no option says something else.
    """

    dataset: str = "digits"
    data: Path | None = None
    download: bool = False
    image_size: int | None = None
    stream: str = "auto"
    arch: str = "small"
    checkpoint: Path | None = None
    epochs: int | None = None
    forget: str = "random:0.1"
    methods: tuple[str, ...] = ("dau", "retrain")
    retrain_recipe: str = "both"
    prune: str = "none"
    sparsity: float | None = None
    sensitivity: str | None = None
    retain_sample: float | None = None
    tune: int | None = None
    seed: int = 0
    repeats: int = 1
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_options(self) -> dict[str, Any]:
        """The options by name, as JSON can hold them; settings apart."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return {name: _readable(value) for name, value in found.items()}

    def list_methods(self) -> tuple[str, ...]:
        """The methods that run: beside retraining also the faster one, where both recipes are asked for.

        "all" stands for every method, and for retraining with masks of its own only where `prune` finds some.
        Raises UserError for unknown methods and recipes.
        """
        check_choice("retrain_recipe", self.retrain_recipe, RETRAIN_RECIPES)
        for name in self.methods:
            if name != "all":
                get_method(name)
        asked = set(self.methods)
        if self.takes_all:
            pointless = {"retrain_fast"} | ({"retrain_clean"} if self.prune == "none" else set())
            asked |= find_methods().keys() - pointless
        if self.retrain_recipe == "both" and "retrain" in asked:
            asked.add("retrain_fast")
        return tuple(name for name in find_methods() if name in asked)

    @property
    def takes_all(self) -> bool:
        """Whether every method is asked for that goes with the task."""
        return "all" in self.methods

    def choose_pruning(self) -> PruneConfig | None:
        """How to prune, None for not at all. Raises UserError for what does not go together."""
        if self.prune == "none":
            if self.sparsity is not None:
                raise UserError("`sparsity` without pruning: add `prune`, such as `prune=omp`")
            return None
        row = get_pruner(self.prune)
        if self.checkpoint and not row.takes_trained:
            raise UserError(
                f"`prune={self.prune}` begins at an untrained network: leave `checkpoint` out, or take "
                "`prune=omp`"
            )
        asked = dict(self.settings.get("prune", {}))
        asked |= {"method": self.prune} | ({} if self.sparsity is None else {"sparsity": self.sparsity})
        return change(PruneConfig(self.prune), asked, "prune")

    def choose_recipe(self) -> TrainingRecipe:
        """How the original is trained."""
        asked = dict(self.settings.get("original", {}))
        if self.epochs is not None:
            asked["epochs"] = self.epochs
        return change(training_recipe(self.dataset), asked, "original")

    def choose_shares(self) -> SplitConfig:
        """What is held out."""
        return change(split_config(self.dataset), self.settings.get("split", {}), "split")

    def ask_methods(self) -> dict[str, dict[str, Any]]:
        """Settings by method, as far as they are asked for."""
        asked = {name: dict(values) for name, values in self.settings.items()}
        fast = asdict(fast_recipe(self.dataset, self.epochs))
        asked["retrain_fast"] = fast | asked.get("retrain_fast", {})
        if self.retrain_recipe == "fast":
            asked["retrain"] = fast | asked.get("retrain", {})
        game = {"sensitivity": self.sensitivity, "retain_sample": self.retain_sample}
        chosen = {name: value for name, value in game.items() if value is not None}
        asked["dau"] = asked.get("dau", {}) | chosen
        return asked


def make_experiment(request: Request, runtime: Runtime, progress: Progress) -> Experiment:
    """Read images and checkpoint of `request` and check it. Raises UserError for what cannot be done."""
    names, pruning, ranks = request.list_methods(), request.choose_pruning(), runtime.ranks
    with ranks.in_turn(request.download):
        images = named.load(
            request.dataset,
            request.data,
            download=request.download,
            image_size=request.image_size,
            stream=request.stream,
            device=runtime.device,
            processes=ranks.local_count,
            progress=progress,
        )
    images = match_precision(images, runtime, narrow=True)
    experiment = Experiment(
        images,
        Forget.parse(request.forget, images.class_names),
        tuple(get_method(name) for name in names),
        network_builder(request.arch, images, runtime),
        request.choose_recipe(),
        request.ask_methods(),
        request.seed,
        request.repeats,
        request.choose_shares(),
        pruning=pruning,
        runtime=runtime,
        trials=request.tune or 0,
        skip_unfit=request.takes_all,
    )
    if request.checkpoint is None:
        return experiment
    return replace(experiment, checkpoint=_read_checkpoint(request.checkpoint, experiment, images))


def _read_checkpoint(path: Path, experiment: Experiment, images: Images) -> Checkpoint:
    """The model in `path`, and the split it was trained on where the file says it."""
    model = experiment.fresh(experiment.seed)
    metadata = checkpoints.load(path, model.network)
    masks = checkpoints.load_masks(path)
    masks = masks and masks.to(model.head.weight.device)
    if "split" in metadata:
        return Checkpoint(model.eval(), decode_roles(metadata["split"], len(images.labels)), masks)
    logging.getLogger("dau_fast").warning(
        "%s does not say which images it was trained on: taking this run's training images; if it "
        "has seen the validation images too, the result is not to be trusted",
        path,
    )
    return Checkpoint(model.eval(), None, masks)


def _readable(value: Any) -> Any:
    """`value` as JSON can hold it; a file's name need not be valid Unicode."""
    if isinstance(value, str | Path):
        return str(value).encode(errors="replace").decode()
    return list(value) if isinstance(value, tuple) else value
