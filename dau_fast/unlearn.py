"""The command line: `python -m dau_fast.unlearn`, the pipeline from top to bottom.

data -> split -> original -> every method on the same task -> measures -> table, JSON, page, weights.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from dau_fast import models
from dau_fast.config import (
    PRUNERS,
    RETRAIN_RECIPES,
    PruneConfig,
    fast_recipe,
    split_config,
    training_recipe,
)
from dau_fast.data import named as data
from dau_fast.data.split import Forget, decode_roles, encode_roles
from dau_fast.data.streaming import StreamedImages
from dau_fast.engine.launch import Launch, Stopped, end_cleanly_when_stopped, lost_contact
from dau_fast.engine.profiling import Profiler
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import choose_device, choose_precision, warm_up
from dau_fast.engine.sharding import check_shard
from dau_fast.engine.steps import ENGINES, choose_engine
from dau_fast.errors import UserError
from dau_fast.job.experiment import Checkpoint, Experiment, SeedResult, builder, run_seed
from dau_fast.methods.dau.view import SENSITIVITIES, check_sensitivity, costs
from dau_fast.methods.retrain import check_clean
from dau_fast.methods.running import METHODS, method_named
from dau_fast.methods.task import Progress, silent
from dau_fast.prune.prunable import prunable_weights
from dau_fast.prune.select import check_sparsity
from dau_fast.report import record
from dau_fast.report.output import OutputFolder
from dau_fast.report.page import render
from dau_fast.report.progress import progress_bars
from dau_fast.report.table import profile_table, table

_POSITIVE = click.IntRange(min=1)
# Images of the batch on which the report says what each sensitivity costs.
_COSTED = 16


@dataclass(frozen=True)
class Options:
    """The command line, as given; `unlearn` below explains each."""

    dataset: str
    data: Path | None
    download: bool
    image_size: int | None
    stream: str
    arch: str
    checkpoint: Path | None
    epochs: int | None
    forget: str
    methods: tuple[str, ...]
    retrain_recipe: str
    prune: str
    sparsity: float | None
    seed: int
    repeats: int
    sensitivity: str
    retain_sample: float | None
    device: str
    precision: str
    engine: str
    accumulate: int
    activation_checkpointing: bool
    shard: bool
    timeout: float
    profile: bool


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--dataset", default="digits", help=f"One of {', '.join(data.NAMES)}.")
@click.option(
    "--data", type=Path, help=f"Where the data set is; {', '.join(data.STORED)}: holds train/ and test/."
)
@click.option("--download", is_flag=True, help="Fetch a data set that is missing.")
@click.option("--image-size", type=_POSITIVE, help="Pixels; resize the images of folder, arrow to a square.")
@click.option(
    "--stream", default="auto", help="Read images while training: on, off, auto if memory is short."
)
@click.option("--arch", default="small", help="small, resnet18, resnet50, vgg16, or torchvision's name.")
@click.option("--checkpoint", type=Path, help="The trained model, .safetensors or a state_dict.")
@click.option("--epochs", type=_POSITIVE, help="Training length of the original and of retraining.")
@click.option("--forget", default="random:0.1", help="random:0.1, class:3 or indices:FILE.")
@click.option("--methods", default="dau,retrain", help=f"Some of {','.join(METHODS)}.")
@click.option("--retrain-recipe", default="both", help=f"One of {', '.join(RETRAIN_RECIPES)}.")
@click.option("--prune", default="none", help=f"Prune the original: none, {', '.join(PRUNERS)}.")
@click.option("--sparsity", type=float, help="Share of the convolutions' weights to prune; 0.95.")
@click.option("--sensitivity", default="classifier", help=f"Of the game: {', '.join(SENSITIVITIES)}.")
@click.option(
    "--retain-sample", type=click.FloatRange(0, min_open=True), help="Retain images to use per forget image."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Decides every random choice.")
@click.option("--repeats", type=_POSITIVE, default=1, help="Seeds; from 2 on with spread and noise floor.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--precision", default="auto", help="auto (bf16 on CUDA), fp32, bf16 or fp64.")
@click.option("--engine", default="auto", help=f"How training steps run: auto, {', '.join(ENGINES)}.")
@click.option("--accumulate", type=_POSITIVE, default=1, help="Parts a batch is taken in, to save memory.")
@click.option("--activation-checkpointing", is_flag=True, help="Keep fewer activations; takes longer.")
@click.option("--shard", is_flag=True, help="Share weights and training state out to the processes.")
@click.option("--timeout", type=click.FloatRange(1), default=600, help="Seconds processes wait for another.")
@click.option("--profile", is_flag=True, help="Say where the time of training steps goes; traces in --out.")
@click.option("--out", type=Path, default=Path("out"), help="For report.json, report.html and weights.")
@click.pass_obj
def unlearn(launch: Launch, /, out: Path, methods: str, **given: Any) -> None:
    """Make a trained image classifier forget part of its training data, and compare with retraining."""
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    options = Options(methods=names, **given)
    device = choose_device(options.device, launch.local_rank)
    ranks = launch.join(device, options.timeout)
    if not ranks.first:
        pipeline(options, device, ranks, silent, None)
        return
    with OutputFolder(out) as folder, progress_bars() as bars:
        report, first = pipeline(options, device, ranks, bars, folder)
        metadata = {key: report["run"][key] for key in ("dataset", "arch")}
        metadata["split"] = encode_roles(first.roles)
        for name, network in first.networks.items():
            masks = first.masks.get(name)
            models.save(folder / f"{name}.safetensors", network, metadata, masks)
            if masks:
                models.save_sparse(folder / f"{name}.sparse.safetensors", network, masks, metadata)
        (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        (folder / "report.html").write_text(render(report), encoding="utf-8")
    console = Console()
    console.print(table(report))
    if "profile" in report["run"]:
        console.print(profile_table(report["run"]["profile"]))
    files = f"{out / 'report.html'} shows the pictures, {out / 'report.json'} has every number."
    console.print(files, markup=False, highlight=False, soft_wrap=True)


def pipeline(
    options: Options, device: torch.device, ranks: Ranks, progress: Progress, folder: Path | None
) -> tuple[dict[str, Any], SeedResult]:
    """Run `options` on `device`: the report, and the first seed's result.

    ranks: the processes that run this together. folder: for traces of a profile, None for no profile.
    """
    began, started = time.perf_counter(), datetime.now(UTC)
    methods = _methods(options)
    pruning = _pruning(options)
    precision = choose_precision(options.precision, device)
    profiler = Profiler(folder) if options.profile and folder else None
    engine = choose_engine(
        options.engine,
        device,
        profiler,
        ranks,
        options.accumulate,
        options.activation_checkpointing,
        options.shard,
    )
    check_shard(options.shard, options.sensitivity, pruned=pruning is not None)
    with ranks.in_turn(options.download):
        images = data.load(
            options.dataset,
            options.data,
            download=options.download,
            image_size=options.image_size,
            stream=options.stream,
            device=device,
            processes=ranks.local_count,
            progress=progress,
        )
    if precision == torch.float64:
        images = replace(images, dtype=precision)
    fresh = builder(options.arch, images, precision, ranks)
    network, some = fresh(options.seed), torch.arange(min(_COSTED, len(images.labels)), device=device)
    check_sensitivity(options.sensitivity, network, images.batch(some[:2]))
    sensitivity_costs = _sensitivity_costs(network, images.batch(some), images.labels[some])
    if pruning:
        prunable_weights(network.network)
    del network  # a device may have no room for it beside another one
    recipe = training_recipe(options.dataset, options.epochs)
    fast = fast_recipe(options.dataset, options.epochs)
    experiment = Experiment(
        images,
        Forget.parse(options.forget, images.class_names),
        methods,
        options.seed,
        split_config(options.dataset),
        recipe,
        {"retrain": fast if options.retrain_recipe == "fast" else recipe, "retrain_fast": fast},
        fresh,
        _checkpoint(options.checkpoint, fresh(options.seed), len(images.labels)),
        options.sensitivity,
        pruning,
        engine,
        options.retain_sample,
    )
    warm_up(device)
    results = [
        run_seed(experiment, options.seed + i, twice=options.repeats > 1, progress=progress)
        for i in range(options.repeats)
    ]
    first = results[0]
    run = {
        "dataset": options.dataset,
        "arch": options.arch,
        "forget": record.forget_facts(_readable(options.forget), first.split),
        "seed": options.seed,
        "repeats": options.repeats,
        "device": device.type,
        "processes": ranks.count,
        "sharded": engine.shard,
        "hardware": record.hardware(device),
        "precision": {None: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[precision],
        "engine": {"asked": options.engine, "loops": engine.chosen},
        "streamed": isinstance(images, StreamedImages),
        "waiting": {loop: waiting.share for loop, waiting in engine.waiting.items()},
        "epochs": experiment.recipe.epochs,
        "retrain_epochs": {name: r.epochs for name, r in experiment.retraining.items() if name in methods},
        "prune": record.prune_facts(pruning, first, checkpoint=options.checkpoint is not None),
        "sensitivity": options.sensitivity,
        "retain_sample": options.retain_sample,
        "sensitivity_costs": sensitivity_costs,
        "sets": record.set_sizes(first.split),
        "versions": record.versions(),
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": time.perf_counter() - began,
    }
    if profiler:
        profiler.finish()
        run["profile"] = {loop: asdict(found) for loop, found in profiler.loops.items()}
    return record.report(run, results), first


def _methods(options: Options) -> tuple[str, ...]:
    """The methods that run: beside retraining also the faster one, where both recipes are asked for."""
    for name in options.methods:
        method_named(name)
    if options.retrain_recipe not in RETRAIN_RECIPES:
        known = ", ".join(RETRAIN_RECIPES)
        raise UserError(f"unknown recipe '{options.retrain_recipe}': expected one of {known}")
    both = options.retrain_recipe == "both" and "retrain" in options.methods
    return tuple(dict.fromkeys((*options.methods, "retrain_fast") if both else options.methods))


def _pruning(options: Options) -> PruneConfig | None:
    """How to prune, None for not at all. Raises UserError for what does not go together."""
    pruning = None
    if options.prune != "none":
        if options.prune not in PRUNERS:
            raise UserError(f"unknown pruning '{options.prune}': expected none, {', '.join(PRUNERS)}")
        pruning = PruneConfig(options.prune)
        if options.checkpoint and options.prune != "omp":
            raise UserError(
                f"--prune {options.prune} begins at an untrained network: leave --checkpoint out, or take "
                "--prune omp"
            )
    if options.sparsity is not None:
        check_sparsity(options.sparsity)
        if pruning is None:
            raise UserError("--sparsity without pruning: add --prune, such as --prune omp")
        pruning = replace(pruning, sparsity=options.sparsity)
    if "retrain_clean" in options.methods:
        check_clean(pruning)
    return pruning


def _sensitivity_costs(
    model: models.Classifier, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, Any]:
    return {"images": len(images), "seconds": costs(model.eval(), images, labels)}


def _readable(text: str) -> str:
    """`text` without what no file can hold: a file's name need not be valid Unicode."""
    return text.encode(errors="replace").decode()


def _checkpoint(path: Path | None, model: models.Classifier, images: int) -> Checkpoint | None:
    """Weights from `path` in `model`, and the split they were trained on where the file says it."""
    if path is None:
        return None
    metadata = models.load(path, model.network)
    masks = models.load_masks(path)
    masks = masks and masks.to(model.head.weight.device)
    if "split" in metadata:
        return Checkpoint(model.eval(), decode_roles(metadata["split"], images), masks)
    logging.getLogger("dau_fast").warning(
        "%s does not say which images it was trained on: taking this run's training images; if it "
        "has seen the validation images too, the result is not to be trusted",
        path,
    )
    return Checkpoint(model.eval(), None, masks)


def main() -> None:
    """Entry point: a user's mistake becomes one line and exit code 2, Ctrl-C exit code 130."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    torch.set_flush_denormal(True)  # before the first worker thread starts and inherits the mode
    end_cleanly_when_stopped()
    launch = Launch()
    try:
        # Not `unlearn()`, which would print an empty line at Ctrl-C, once a process.
        with unlearn.make_context("python -m dau_fast.unlearn", sys.argv[1:], obj=launch) as context:
            unlearn.invoke(context)
        launch.leave()
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except UserError as error:
        sys.exit(_fail(launch, f"error: {error}", 2))
    except click.ClickException as error:
        sys.exit(_fail(launch, f"error: {error.format_message()}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail(launch, "interrupted: nothing was written", 130))
    except Stopped:
        sys.exit(_fail(launch, "stopped: nothing was written", 143))
    except RuntimeError as error:
        reason = lost_contact(error)
        if reason is None:
            raise
        told = f"error: process {launch.rank} lost contact with another, which failed or hangs: {reason}"
        sys.exit(_fail(launch, told, 1))


def _fail(launch: Launch, message: str, code: int) -> int:
    """Say why the run ends, unless another process did, and return the exit code."""
    if launch.speaks():
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
