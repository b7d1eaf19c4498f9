"""An audit as it is asked for: which models, on which split, against which references; and its run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dau_fast import checkpoints
from dau_fast.audits.comparing import Context
from dau_fast.audits.evidence import Evidence, Scene, examine
from dau_fast.audits.verdicts import Audited, audit_models
from dau_fast.config import AuditConfig
from dau_fast.data.progress import Progress, silent
from dau_fast.engine.device import run_flushed
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError, exists
from dau_fast.job.experiment import Experiment, make_task
from dau_fast.job.provenance import check_reference, check_unlearned
from dau_fast.job.request import Request, make_experiment
from dau_fast.methods import retrain
from dau_fast.methods.running import run_timed
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

# Of references in a folder.
_SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class AuditRequest:
    """What to audit. Exactly one of the last two is given.

    checkpoints: of the audited models, at least one; several are taken for one method's, by seed. run: data
    set, architecture, forget set and seed as in the run that made them, and the original as its checkpoint.
    references: a folder of retrained models. train_references: how many to train.
    """

    checkpoints: tuple[Path, ...]
    run: Request
    references: Path | None = None
    train_references: int | None = None

    def __post_init__(self) -> None:
        if (self.references is None) == (self.train_references is None):
            raise UserError(
                "an audit needs retrained models to compare with: give `references` or `train_references`, "
                "and not both"
            )


@dataclass(frozen=True)
class AuditOutcome:
    """An audit's result. trained: the references that were trained for it, to be kept.

    roles: of every image, int8 [N]. models, original, references: what was seen of each.
    """

    audited: Audited
    task: Task
    roles: np.ndarray
    config: AuditConfig
    models: list[Evidence]
    original: Evidence
    references: list[Evidence]
    reference_files: list[str]
    trained: list[Classifier]


def run_audit(request: AuditRequest, runtime: Runtime, progress: Progress = silent) -> AuditOutcome:
    """Read all models, train references where asked for, look at each model once and compare.

    Raises UserError for models that do not belong together, and for too few references.
    """
    experiment = make_experiment(
        replace(request.run, methods=("retrain",), retrain_recipe="literature"), runtime, progress
    )
    roles = experiment.draw_roles(experiment.seed)
    task = make_task(experiment, roles, experiment.seed, progress)
    return run_flushed(partial(_run_audit, request, experiment, task, roles, progress), runtime.device)


def _run_audit(
    request: AuditRequest, experiment: Experiment, task: Task, roles: np.ndarray, progress: Progress
) -> AuditOutcome:
    config = AuditConfig()
    scene = Scene(task.images, task.split, task.seed, config)
    files = _list_files(request)
    _check_count(request, len(files))
    audited = [_read(path, experiment, task, roles) for path in request.checkpoints]
    references = _read_references(files, experiment, task, roles)
    trained = _train_references(request.train_references or 0, experiment, task)
    models = [task.original.eval(), *audited, *references, *trained]
    advance = progress("looking at models", len(models))
    seen: list[Evidence] = []
    for model in models:
        target = 100.0 - seen[0].measures.ua if seen else 0.0
        seen.append(examine(model, scene, target))
        advance()
    original, found, others = seen[0], seen[1 : 1 + len(audited)], seen[1 + len(audited) :]
    context = Context([original], scene.forget_counts, config)
    names = [path.name for path in files] or [f"reference_{i + 1}.safetensors" for i in range(len(trained))]
    return AuditOutcome(
        audit_models(found, others, context), task, roles, config, found, original, others, names, trained
    )


# ---- models from files


def _list_files(request: AuditRequest) -> list[Path]:
    """The references' files, by name. UserError for a folder without any, and for the same model twice."""
    folder = request.references
    if folder is None:
        return []
    if not exists(folder, "folder"):
        raise UserError(f"`references={folder}` is not a folder: name one that holds retrained models")
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    files = [path for path in files if not path.name.endswith(".sparse.safetensors")]
    seen = {_digest(path): path for path in request.checkpoints if exists(path, "file")}
    for path in files:
        twin = seen.setdefault(_digest(path), path)
        if twin is not path:
            raise UserError(f"reference '{path}' is the same model as '{twin}': name every model once")
    return files


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"checkpoint '{path}' cannot be read: {error.strerror}") from error


def _check_count(request: AuditRequest, found: int) -> None:
    """Before anything is trained: two folds of references, each as many as there are audited models."""
    count, size = request.train_references or found, len(request.checkpoints)
    if count < 2 * size:
        option = "train_references" if request.references is None else f"references={request.references}"
        raise UserError(
            f"`{option}`: {count} retrained models for {size} audited ones: expected at least {2 * size}, of "
            "which as many can be held out twice"
        )


def _read(path: Path, experiment: Experiment, task: Task, roles: np.ndarray) -> Classifier:
    model = experiment.fresh(experiment.seed)
    check_unlearned(path, checkpoints.load(path, model.network), roles, task.split)
    return model.eval()


def _read_references(
    files: list[Path], experiment: Experiment, task: Task, roles: np.ndarray
) -> list[Classifier]:
    models, methods = [], set()
    for path in files:
        model = experiment.fresh(experiment.seed)
        methods.add(check_reference(path, checkpoints.load(path, model.network), roles, task.split))
        models.append(model.eval())
    if len(methods) > 1:
        raise UserError(
            f"the references were retrained in several ways ({', '.join(sorted(methods))}): name those of one"
        )
    return models


# ---- models that are trained here


def _train_references(count: int, experiment: Experiment, task: Task) -> list[Classifier]:
    """`count` retrained models, the same for the same seed whatever their number."""
    return [_retrain(i, experiment, task) for i in range(count)]


def _retrain(number: int, experiment: Experiment, task: Task) -> Classifier:
    name = f"reference {number + 1}"
    method = experiment.methods[0]
    settings = method.resolve(task, experiment.asked.get(method.name))
    own = replace(task, seed=task.derive_seed(name))
    return run_timed(name, lambda given: retrain.unlearn(given, settings), own).model
