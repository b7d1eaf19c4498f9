"""`dau_fast evaluate`: what checkpoints know of the forget set, measured side by side; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from dau_fast.commands.help import SHARED, GroupedCommand
from dau_fast.engine.launch import Launch
from dau_fast.engine.runtime import Runtime, choose_device, choose_precision
from dau_fast.errors import UserError, printable
from dau_fast.job.evaluation import evaluate
from dau_fast.job.request import Request
from dau_fast.report.evaluation import describe_evaluation
from dau_fast.report.manifest import describe_files
from dau_fast.report.output import OutputFolder
from dau_fast.report.progress import progress_bars
from dau_fast.report.table import table
from dau_fast.report.terminal import terminal


class _Evaluate(GroupedCommand):
    examples = (
        "dau_fast evaluate out/dau.safetensors out/ga.safetensors --original out/original.safetensors \\",
        "    --reference out/retrain.safetensors",
    )


def make_evaluate(unlearning: Sequence[click.Parameter]) -> click.Command:
    """The command. unlearning: the options of the command that unlearns, of which it takes SHARED."""
    shared = [parameter for parameter in unlearning if parameter.name in SHARED["evaluate"]]
    own: list[click.Parameter] = [
        click.Argument(["measured"], metavar="CHECKPOINT...", nargs=-1, required=True, type=Path),
        click.Option(["--original"], type=Path, required=True, help="The model from before unlearning."),
        click.Option(["--reference"], type=Path, help="A retrained model, that the others are held to."),
    ]
    return _Evaluate(
        "evaluate",
        params=[*own, *shared],
        callback=_evaluate,
        help="Measure checkpoints side by side on the sets of the original. Nothing is trained.",
        context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    )


@click.pass_context
def _evaluate(
    context: click.Context,
    /,
    measured: tuple[Path, ...],
    original: Path,
    reference: Path | None,
    out: Path,
    device: str,
    precision: str,
    **given: Any,
) -> None:
    launch: Launch = context.obj
    if launch.local_rank is not None:
        raise UserError("an evaluation is for one process: start it without torchrun")
    place, started = choose_device(device), datetime.now(UTC)
    runtime = Runtime(place, precision=choose_precision(precision, place))
    request = Request(checkpoint=original, **given)
    files = {"original": original, **({"retrain": reference} if reference else {}), **_name_files(measured)}
    with OutputFolder(out, "evaluation.json") as folder, progress_bars() as bars:
        report = describe_evaluation(request, evaluate(request, files, runtime, bars), started)
        report["files"] = describe_files(folder)  # none: those beside it are not its own
        (folder / "evaluation.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    told = printable(f"{out / 'evaluation.json'} has every number.")
    with terminal(out) as console:
        console.print(table(report))
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def _name_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Each of `paths` by its stem, by more of it where several have the same."""
    stems = [path.stem for path in paths]
    taken = {"original", "retrain"}
    named: dict[str, Path] = {}
    for path, stem in zip(paths, stems, strict=True):
        name = stem if stems.count(stem) == 1 and stem not in taken else str(path.with_suffix(""))
        if name in named:
            raise UserError(f"'{path}' is named twice: name every checkpoint once")
        named[name] = path
    return named
