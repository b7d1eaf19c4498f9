"""Measuring again what a finished run says of its models, from their files and the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dau_fast import checkpoints
from dau_fast.data.progress import Progress, silent
from dau_fast.data.split import Forget
from dau_fast.engine.device import run_flushed
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.job.assembly import measure_model
from dau_fast.job.experiment import make_task
from dau_fast.job.keeping import digest_images
from dau_fast.job.request import Request, make_experiment
from dau_fast.metrics.unlearning import Measures


@dataclass(frozen=True)
class Remeasured:
    """images: the digest of the data that were measured on. measures: by method."""

    images: str
    measures: dict[str, Measures]


def measure_again(
    folder: Path,
    run: Mapping[str, Any],
    methods: Sequence[str],
    runtime: Runtime,
    data: Path | None = None,
    progress: Progress = silent,
) -> Remeasured:
    """Measure the models of `methods` whose weights are in `folder`, the original among them, as `run` did.

    run: the report's "run". data: where the data set is, if not where it was. Raises UserError for what
    cannot be read.
    """
    try:
        request = _request(folder, run, data)
        forget = Forget(run["forget"]["spec"], indices=tuple(map(int, run["forget"]["indices"])))
        seed = int(run["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the report in '{folder}' does not say how it came about (no {error})") from error
    experiment = replace(make_experiment(request, runtime, progress), forget=forget)
    assert experiment.checkpoint is not None
    if experiment.checkpoint.roles is None:
        raise UserError(f"'{request.checkpoint}' does not say which images it was trained on")
    task = make_task(experiment, experiment.checkpoint.roles, seed)

    def measure_all() -> dict[str, Measures]:
        found = {}
        for name in methods:
            model = task.original if name == "original" else experiment.fresh(seed)
            if name != "original":
                checkpoints.load(folder / f"{name}.safetensors", model.network)
            found[name] = measure_model(model.eval(), task)
        return found

    return Remeasured(digest_images(task), run_flushed(measure_all, runtime.device))


def _request(folder: Path, run: Mapping[str, Any], data: Path | None) -> Request:
    """What reads the data and the original; nothing is trained."""
    known = {field.name for field in fields(Request)}
    options = {name: value for name, value in run["options"].items() if name in known}
    place = data if data is not None else options.get("data")
    chosen = {
        "data": None if place is None else Path(place),
        "download": False,
        "checkpoint": folder / "original.safetensors",
        "forget": "random:0.5",  # takes the place of a file of indices, which the report holds itself
        "methods": ("ft",),
        "prune": "none",
        "sparsity": None,
        "tune": None,
    }
    return Request(**{**options, **chosen})
