"""The command line: `python -m dau_fast.unlearn` parses, calls and prints.

Its request and runtime make an experiment, whose results become a report: table, JSON, page, weights.
"""

from __future__ import annotations

from dau_fast.engine import starting  # noqa: F401  isort: skip  # first: what follows takes seconds to import

import io
import json
import logging
import os
import re
import select
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

from dau_fast import checkpoints
from dau_fast.commands.help import GroupedCommand
from dau_fast.config import RETRAIN_RECIPES, SENSITIVITIES
from dau_fast.data.named import NAMES, RESIZED, STORED
from dau_fast.data.normalisation import NORMALISATIONS
from dau_fast.data.progress import Progress, silent
from dau_fast.engine.launch import Launch, Stopped, end_cleanly_when_stopped, lost_contact, undisturbed
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import ENGINES, Runtime, choose_device, choose_precision
from dau_fast.errors import UserError, printable
from dau_fast.job.assembly import measure_sensitivities
from dau_fast.job.config_file import read_config
from dau_fast.job.experiment import SeedResult, run_experiment
from dau_fast.job.keeping import Keeper
from dau_fast.job.loading import load_module
from dau_fast.job.provenance import describe_origin
from dau_fast.job.request import Request, make_experiment
from dau_fast.methods.registry import find_methods
from dau_fast.prune.registry import find_pruners
from dau_fast.report.facts import describe_costs, describe_run
from dau_fast.report.manifest import describe_files
from dau_fast.report.output import KEPT, OutputFolder
from dau_fast.report.page import render
from dau_fast.report.progress import progress_bars
from dau_fast.report.record import build_report
from dau_fast.report.risk import describe_at_risk
from dau_fast.report.table import profile_table, table
from dau_fast.report.terminal import terminal

_POSITIVE, _MANY = click.IntRange(min=1), click.IntRange(1, 10_000)
_PIXELS = click.IntRange(1, 2**14)


def _listed(names: Any) -> str:
    return ", ".join(names)


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Let a file's options stand where the command line says nothing."""
    if path is None:
        return
    options, settings = read_config(path)
    known = {parameter.name for parameter in context.command.params} | {"loop_parts"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise UserError(f"`config={path}` names the unknown option '{unknown[0]}': leave it out")
    if isinstance(options.get("methods"), list):
        options["methods"] = ",".join(options["methods"])
    context.meta["settings"], context.meta["loop_parts"] = settings, options.pop("loop_parts", {})
    context.default_map = {name: value for name, value in options.items() if value is not None}


def _load_plugins(_: click.Context, __: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Run the users' code that registers methods, before any method's name is read."""
    for name in names:
        load_module(name)
    return names


class _Unlearn(GroupedCommand):
    examples = (
        "dau_fast --forget class:3",
        "dau_fast --dataset folder --data DIR --arch resnet18 --checkpoint model.safetensors \\",
        "    --forget file:requests.csv",
        "dau_fast --dataset folder --data DIR --model net.py:make --mean imagenet --checkpoint model.pt \\",
        "    --forget file:delete.txt --methods dau",
        "dau_fast --forget random:0.1 --methods all --tune 20 --repeats 5",
    )


@click.command(cls=_Unlearn, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--dataset", default="digits", help=f"One of {_listed(NAMES)}.")
@click.option("--data", type=Path, help=f"Where the data set is; {_listed(STORED)}: holds train/ and test/.")
@click.option("--download", is_flag=True, help="Fetch a data set that is missing.")
@click.option("--image-size", type=_PIXELS, help=f"Pixels; resize to a square; {_listed(RESIZED)} alone.")
@click.option("--mean", help=f"Of pixels / 255, a number a channel; or {_listed((*NORMALISATIONS, 'timm'))}.")
@click.option("--std", help="Standard deviation, alike; both as the model was trained with.")
@click.option(
    "--stream", default="auto", help="Read images while training: on, off, auto if memory is short."
)
@click.option(
    "--arch", default="small", help="small, resnet18, resnet50, vgg16, torchvision's name, timm:NAME."
)
@click.option("--model", help="Your own network in place of --arch: FILE.py:factory or module:factory.")
@click.option("--checkpoint", type=Path, help="The trained model, .safetensors or a state_dict.")
@click.option("--epochs", type=_POSITIVE, help="Training length of the original and of retraining.")
@click.option(
    "--forget", default="random:0.1", help="random:0.1, class:3, or file:FILE of indices or file names."
)
@click.option("--methods", default="dau,retrain", help=f"all, or some of {_listed(find_methods())}.")
@click.option(
    "--plugin", multiple=True, is_eager=True, callback=_load_plugins, metavar="FILE.py",
    help="Python that registers methods, pruners or attacks of yours; also an installed module.",
)  # fmt: skip
@click.option("--retrain-recipe", default="both", help=f"One of {_listed(RETRAIN_RECIPES)}.")
@click.option("--prune", default="none", help=f"Prune the original: none, {_listed(find_pruners())}.")
@click.option("--sparsity", type=float, help="Share of the convolutions' weights to prune; 0.95.")
@click.option("--sensitivity", help=f"Of the game: {_listed(SENSITIVITIES)}; none.")
@click.option(
    "--retain-sample", type=click.FloatRange(0, min_open=True), help="Retain images to use per forget image."
)
@click.option("--tune", type=_MANY, help="Settings to try for each method that has any; left out, none.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Decides every random choice.")
@click.option("--repeats", type=_MANY, default=1, help="Seeds; from 2 on with spread and noise floor.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--precision", default="auto", help="auto (bf16 on CUDA), fp32, bf16 or fp64.")
@click.option("--engine", default="auto", help=f"How training steps run: auto, {_listed(ENGINES)}.")
@click.option("--accumulate", type=_POSITIVE, default=1, help="Parts a batch is taken in, to save memory.")
@click.option("--activation-checkpointing", is_flag=True, help="Keep fewer activations; takes longer.")
@click.option("--shard", is_flag=True, help="Share weights and training state out to the processes.")
@click.option("--timeout", type=click.FloatRange(1), default=600, help="Seconds processes wait for another.")
@click.option("--profile", is_flag=True, help="Say where the time of training steps goes; traces in --out.")
@click.option("--thumbnails", is_flag=True, help="Show the forgotten images most at risk on the page.")
@click.option(
    "--config", type=Path, is_eager=True, expose_value=False, callback=_read_config,
    help="A report.json to run again, or a .toml file with options; those given here go first.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from what a killed run with the same --out had finished.")
@click.option("--out", type=Path, default=Path("out"), help="For report.json, report.html and weights.")
@click.pass_context
def unlearn(context: click.Context, /, out: Path, methods: str, **given: Any) -> None:
    """Make a trained image classifier forget part of its training data, and compare with retraining."""
    launch: Launch = context.obj
    device = choose_device(given.pop("device"), launch.local_rank, launch.local_count)
    ranks = launch.join(device, given.pop("timeout"))
    profiled, resume, thumbnails = (given.pop(name) for name in ("profile", "resume", "thumbnails"))
    if resume and not ranks.alone:
        raise UserError("`resume` is for one process: leave it out, or start without torchrun")
    computing = {name: given.pop(name) for name in _COMPUTING}
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    request = Request(methods=names, settings=context.meta.get("settings", {}), **given)
    parts = context.meta.get("loop_parts", {})
    if not ranks.first:
        _run(request, _make_runtime(device, ranks, computing, parts, None), silent)
        return
    with OutputFolder(out, resume=resume) as folder, progress_bars() as bars:
        runtime = _make_runtime(device, ranks, computing, parts, folder if profiled else None)
        report, result = _run(request, runtime, bars, Keeper(folder / KEPT))
        report["run"]["command"] = context.meta["command"]
        report["at_risk"] = describe_at_risk(result, thumbnails=thumbnails)
        _write(folder, report, result)
    _print(report, result, out)


# Options of the runtime.
_COMPUTING = ("precision", "engine", "accumulate", "activation_checkpointing", "shard")


def _make_runtime(
    device: torch.device, ranks: Ranks, computing: dict[str, Any], parts: dict[str, int], traces: Path | None
) -> Runtime:
    precision = choose_precision(computing["precision"], device)
    settings = {**computing, "precision": precision, "loop_parts": parts, "traces": traces}
    return Runtime(device, ranks=ranks, **settings)


def _run(
    request: Request, runtime: Runtime, progress: Progress, keeper: Keeper | None = None
) -> tuple[dict[str, Any], SeedResult]:
    """The report, and the first seed's result."""
    began, started = time.perf_counter(), datetime.now(UTC)
    experiment = replace(make_experiment(request, runtime, progress), keeper=keeper)
    results = run_experiment(experiment, progress)
    run = describe_run(request, experiment, results, started, time.perf_counter() - began)
    if runtime.traces:
        run["sensitivity_costs"] = measure_sensitivities(results[0].outcome.task)
    return build_report(run, results), results[0]


def _write(folder: Path, report: dict[str, Any], result: SeedResult) -> None:
    """Weights, report and page into `folder`."""
    run, masks = report["run"], result.outcome.masks
    for name, network in result.networks.items():
        metadata = describe_origin(
            run["dataset"], run["arch"], name, result.roles, result.outcome.task, guessed=result.guessed
        )
        checkpoints.save(folder / f"{name}.safetensors", network, metadata, masks.get(name))
        if name in masks:
            checkpoints.save_sparse(folder / f"{name}.sparse.safetensors", network, masks[name], metadata)
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    report["files"] = describe_files(folder)
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def _print(report: dict[str, Any], result: SeedResult, out: Path) -> None:
    files = f"{out / 'report.html'} shows the pictures, {out / 'report.json'} has every number."
    with terminal(out) as console:
        console.print(table(report))
        if "profile" in report["run"]:
            console.print(profile_table(report["run"]["profile"]))
            costs = describe_costs(result)
            if costs:
                console.print(costs.describe(), markup=False, highlight=False)
        console.print(printable(files), markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of unlearning; see `run_command`."""
    run_command(unlearn, "python -m dau_fast.unlearn", sys.argv[1:])


def run_command(command: click.Command, name: str, arguments: Sequence[str]) -> None:
    """Run `command`: a user's mistake becomes one line and exit code 2, Ctrl-C exit code 130.

    Its context's object is this process's Launch.
    """
    _prepare_streams()
    torch.set_flush_denormal(True)  # before the first worker thread starts and inherits the mode
    end_cleanly_when_stopped()
    launch: Launch | None = None
    try:
        launch = Launch()
        # Not `command()`, which would print an empty line at Ctrl-C, once a process.
        with command.make_context(name, list(arguments), obj=launch) as context:
            context.meta["command"] = printable(f"{name} {shlex.join(arguments)}".strip())
            command.invoke(context)
        launch.leave()
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except UserError as error:
        sys.exit(_fail(launch, f"error: {_as_flags(str(error), command)}", 2))
    except click.ClickException as error:
        sys.exit(_fail(launch, f"error: {error.format_message()}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail(launch, "interrupted: nothing was written", 130))
    except Stopped as stopped:
        sys.exit(_fail(launch, "stopped: nothing was written", 128 + stopped.number))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            sys.exit(128 + 13)  # as a program that SIGPIPE ends
        sys.exit(_fail(launch, f"error: the system refused: {error}", 1))
    except (MemoryError, RuntimeError, ImportError) as error:
        told = _explain(launch, error)
        if told is None:
            raise
        sys.exit(_fail(launch, f"error: {told}", 1))


def _reader_left() -> bool:
    """Whether nobody reads what is printed, as behind `| head`; what is left of it is then let go."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)  # POLLERR is always told of
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _prepare_streams() -> None:
    """Log lines and results that any terminal can show, and that cannot steer one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("dau_fast").setLevel(logging.INFO)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


# Of what asks for memory, and of the system's loader of libraries, some of which are loaded when needed.
_SHORT = ("allocate memory", "failed to map segment")


def _explain(launch: Launch | None, error: MemoryError | RuntimeError | ImportError) -> str | None:
    """Why the run ends with `error`, where that is not a fault of this program."""
    reason = lost_contact(error) if isinstance(error, RuntimeError) else None
    if reason is not None and launch is not None:
        return f"process {launch.rank} lost contact with another, which failed or hangs: {reason}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in _SHORT):
        return (
            f"memory is short ({str(error).splitlines()[0] if str(error) else 'none is left'}): stream the "
            "images, take smaller ones or fewer at a time, or a machine with more memory"
        )
    return None


def _as_flags(message: str, command: click.Command) -> str:
    """`message` with the settings that stand in backquotes, as fields, written as options of `command`."""
    options = {parameter.name: parameter.opts[0] for parameter in command.params}

    def flag(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if name not in options:
            return found[0]
        return options[name] if value in (None, "True") else f"{options[name]} {value}"

    return re.sub(r"`(?P<name>\w+)(=(?P<value>[^`]*))?`", flag, message)


def _fail(launch: Launch | None, message: str, code: int) -> int:
    """Say why the run ends, unless another process did, and return the exit code."""
    with undisturbed():
        if launch is None or launch.speaks():
            print(printable(" ".join(message.split())), file=sys.stderr, flush=True)
    return code


class _Callable(ModuleType):
    """This module, which bears the name of the call from Python, and so can be called as it."""

    def __call__(self, *sets: Any, **named: Any) -> Any:
        """See `dau_fast.api.unlearn`."""
        from dau_fast.api import unlearn as call

        return call(*sets, **named)


if __name__ != "__main__":
    sys.modules[__name__].__class__ = _Callable
if __name__ == "__main__":
    main()
