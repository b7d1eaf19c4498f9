"""What was measured of checkpoints, as a dictionary that the table reads."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from dau_fast.data.split import range_class_sizes
from dau_fast.job.evaluation import Evaluation
from dau_fast.job.request import Request
from dau_fast.report.facts import count_sets, describe_forget_set, list_versions
from dau_fast.report.record import SCHEMA, method_entry


class _Untimed:
    """Nobody stood by when a checkpoint was made."""

    seconds: float | None = None
    compile_seconds: float = 0.0


def describe_evaluation(request: Request, found: Evaluation, started: datetime) -> dict[str, Any]:
    """evaluation.json: how it ran, and the entry of each model as report.json has it."""
    options, split = request.to_options(), found.task.split
    reference = (found.measures["retrain"], _Untimed()) if "retrain" in found.measures else None
    return {
        "schema": SCHEMA,
        "run": {
            "dataset": request.dataset,
            "arch": request.arch_name,
            "forget": describe_forget_set(options["forget"], split),
            "seed": request.seed,
            "sets": count_sets(split),
            "class_sizes": range_class_sizes(split, found.task.labels),
            "methods": {
                "retrain": {
                    "label": "retrained",
                    "about": "the reference",
                    "reference": True,
                    "control": False,
                }
            },
            "options": options,
            "versions": list_versions(),
            "started": started.isoformat(timespec="seconds"),
        },
        "methods": {
            name: method_entry(measures, None, reference) for name, measures in found.measures.items()
        },
        "noise_floor": None,
    }
