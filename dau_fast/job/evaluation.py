"""Checkpoints measured as they are: nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dau_fast import checkpoints
from dau_fast.data.progress import Progress, silent
from dau_fast.engine.device import run_flushed
from dau_fast.engine.runtime import Runtime
from dau_fast.job.assembly import measure_model
from dau_fast.job.experiment import Experiment, make_task
from dau_fast.job.provenance import check_unlearned
from dau_fast.job.request import Request, make_experiment
from dau_fast.methods.task import Task
from dau_fast.metrics.unlearning import Measures
from dau_fast.models import Classifier


@dataclass(frozen=True)
class Evaluation:
    """What was measured, by name: "original" and "retrain", where they were given, and files' stems.

    roles: of every image, int8 [N].
    """

    experiment: Experiment
    task: Task
    roles: np.ndarray
    measures: dict[str, Measures]


def evaluate(
    request: Request, files: Mapping[str, Path], runtime: Runtime, progress: Progress = silent
) -> Evaluation:
    """Measure the models in `files`, by name, on the split that `request` asks for.

    The split is that of request.checkpoint, which one of the files is. Raises UserError for models that do
    not belong together.
    """
    experiment = make_experiment(replace(request, methods=()), runtime, progress)
    roles = experiment.draw_roles(experiment.seed)
    task = make_task(experiment, roles, experiment.seed, progress)
    advance = progress("measuring models", len(files))
    measures = {}
    for name, path in files.items():
        model = _read(path, experiment, task, roles, checked=path != request.checkpoint)
        measures[name] = run_flushed(partial(measure_model, model, task), runtime.device)
        advance()
    return Evaluation(experiment, task, roles, measures)


def _read(path: Path, experiment: Experiment, task: Task, roles: np.ndarray, *, checked: bool) -> Classifier:
    model = experiment.fresh(experiment.seed)
    metadata = checkpoints.load(path, model.network)
    if checked and metadata.get("method", "original") != "original":
        check_unlearned(path, metadata, roles, task.split)
    return model.eval()
