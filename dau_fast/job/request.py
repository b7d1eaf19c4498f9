"""A run as it is asked for on the command line, and the experiment that this makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from dau_fast import checkpoints, models
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
from dau_fast.data.normalisation import Constants, normalise_by, parse_normalisation
from dau_fast.data.progress import Progress
from dau_fast.data.requests import read_request
from dau_fast.data.split import Forget
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError, check_choice
from dau_fast.job.assembly import match_precision, network_builder
from dau_fast.job.checkpoint import start_from
from dau_fast.job.experiment import Experiment
from dau_fast.job.fitting import own_network_builder
from dau_fast.job.loading import build_network
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.models import Classifier
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
    mean: str | None = None
    std: str | None = None
    stream: str = "auto"
    arch: str = "small"
    model: str | None = None
    checkpoint: Path | None = None
    epochs: int | None = None
    forget: str = "random:0.1"
    methods: tuple[str, ...] = ("dau", "retrain")
    plugin: tuple[str, ...] = ()
    retrain_recipe: str = "both"
    prune: str = "none"
    sparsity: float | None = None
    sensitivity: str | None = None
    retain_sample: float | None = None
    tune: int | None = None
    seed: int = 0
    repeats: int = 1
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def arch_name(self) -> str:
        """What the network is called: the factory that makes it, where there is one."""
        return self.model or self.arch

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
    _check_files(request)
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
    images = match_precision(images, runtime, narrow=request.model is None)
    constants = _choose_normalisation(request, len(images.mean))
    if constants:
        images = normalise_by(images, constants)
    experiment = Experiment(
        images,
        Forget.parse(request.forget, images.class_names, images.names),
        tuple(get_method(name) for name in names),
        _choose_network(request, images, runtime),
        request.choose_recipe(),
        request.ask_methods(),
        request.seed,
        request.repeats,
        request.choose_shares(),
        pruning=pruning,
        runtime=runtime,
        trials=request.tune or 0,
        skip_unfit=request.takes_all,
        normalised_by="the options" if constants else "the data set",
    )
    if request.checkpoint is None:
        return experiment
    return start_from(experiment, request.checkpoint, normalised=constants is not None)


def _choose_normalisation(request: Request, channels: int) -> Constants | None:
    """The constants that were asked for; None where the checkpoint or the images decide."""
    if request.mean != "timm":
        return parse_normalisation(request.mean, request.std, channels)
    mean, std = models.find_normalisation(request.arch)
    if request.std is not None or len(mean) != channels:
        raise UserError(f"`mean=timm` stands for both, on {len(mean)} channels: leave `std` out")
    return mean, std


def _check_files(request: Request) -> None:
    """What is wrong with a file is said before images are read, which may take long."""
    if request.checkpoint is not None:
        checkpoints.check(request.checkpoint)
    kind, _, value = request.forget.partition(":")
    if kind == "file":
        read_request(Path(value))
    elif kind == "indices":
        Forget.parse(request.forget, ())


def _choose_network(request: Request, images: Images, runtime: Runtime) -> Callable[[int], Classifier]:
    """seed -> a newly initialised network: of an architecture by name, or of a user's own factory."""
    if request.model is None:
        return network_builder(request.arch, images, runtime)
    spec = request.model

    def make() -> nn.Module:
        return build_network("model", spec)

    return own_network_builder(make, images, runtime)


def _readable(value: Any) -> Any:
    """`value` as JSON can hold it; a file's name need not be valid Unicode."""
    if isinstance(value, str | Path):
        return str(value).encode(errors="replace").decode()
    return list(value) if isinstance(value, tuple) else value
