"""The command line: `python -m dau_fast.unlearn`, the pipeline from top to bottom.

data -> split -> original -> every method on the same task -> measures -> table, JSON, page, weights.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor

from dau_fast import data, models
from dau_fast.config import split_config, training_recipe
from dau_fast.data import Images
from dau_fast.engine.batches import generator_for
from dau_fast.engine.runtime import choose_device, choose_precision, warm_up
from dau_fast.errors import UserError
from dau_fast.methods import METHODS, Finished, method_named, run
from dau_fast.metrics.unlearning import Measures, avg_gap, measure
from dau_fast.models import Classifier
from dau_fast.report import record
from dau_fast.report.output import OutputFolder
from dau_fast.report.page import render
from dau_fast.report.progress import progress_bars
from dau_fast.report.table import table
from dau_fast.rivals import original, retrain
from dau_fast.split import Forget, Split, decode_roles, encode_roles, hold_out, make_split
from dau_fast.task import Progress, Task

POSITIVE = click.IntRange(min=1)


@dataclass(frozen=True)
class Options:
    """The command line, as given."""

    dataset: str
    data: Path | None
    download: bool
    image_size: int | None
    arch: str
    checkpoint: Path | None
    epochs: int | None
    forget: str
    methods: tuple[str, ...]
    seed: int
    repeats: int
    device: str
    precision: str


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--dataset", default="digits", help=f"One of {', '.join(data.NAMES)}.")
@click.option("--data", type=Path, help="Where the data set is; folder: holds train/ and test/.")
@click.option("--download", is_flag=True, help="Fetch a data set that is missing.")
@click.option("--image-size", type=POSITIVE, help="Pixels; resize the images of folder to a square.")
@click.option("--arch", default="small", help="small, resnet18, resnet50, vgg16, or torchvision's name.")
@click.option("--checkpoint", type=Path, help="The trained model, .safetensors or a state_dict.")
@click.option("--epochs", type=POSITIVE, help="Training length of the original and of retraining.")
@click.option("--forget", default="random:0.1", help="random:0.1, class:3 or indices:FILE.")
@click.option("--methods", default="dau,retrain", help=f"Some of {','.join(METHODS)}.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides every random choice.")
@click.option("--repeats", type=POSITIVE, default=1, help="Seeds; from 2 on with spread and noise floor.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--precision", default="auto", help="auto (bf16 on CUDA), fp32 or bf16.")
@click.option("--out", type=Path, default=Path("out"), help="For report.json, report.html and weights.")
def command(out: Path, **given: Any) -> None:
    """Make a trained image classifier forget part of its training data, and compare with retraining."""
    methods = tuple(dict.fromkeys(name.strip() for name in given.pop("methods").split(",")))
    options = Options(methods=methods, **given)
    with OutputFolder(out) as folder, progress_bars() as bars:
        report, saved = pipeline(options, bars)
        for name, (network, metadata) in saved.items():
            models.save(folder / f"{name}.safetensors", network, metadata)
        (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        (folder / "report.html").write_text(render(report), encoding="utf-8")
    console = Console()
    console.print(table(report))
    console.print(f"{out / 'report.html'} shows the pictures, {out / 'report.json'} has every number.")


def pipeline(options: Options, progress: Progress) -> tuple[dict[str, Any], dict[str, Saved]]:
    """Run `options`; the report, and the first seed's networks with their metadata by method."""
    began, started = time.perf_counter(), datetime.now(UTC)
    for name in options.methods:
        method_named(name)
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    images = data.load(
        options.dataset, options.data, download=options.download, image_size=options.image_size,
        progress=progress,
    ).to(device)  # fmt: skip
    forget = Forget.parse(options.forget, images.class_names)

    def fresh(seed: int) -> Classifier:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = models.build(options.arch, len(images.class_names), images.shape)
        network = network.to(device).to(memory_format=torch.channels_last)
        return Classifier(network, precision=precision)

    given = _load_original(options, images, fresh) if options.checkpoint else None
    warm_up(device)
    results = [
        _run_seed(options, options.seed + i, images, forget, fresh, given, progress)
        for i in range(options.repeats)
    ]
    first = results[0]
    report = {
        "schema": record.SCHEMA,
        "run": {
            "dataset": options.dataset,
            "arch": options.arch,
            "forget": _forget_facts(options.forget, first.split),
            "seed": options.seed,
            "repeats": options.repeats,
            "device": str(device),
            "hardware": record.hardware(device),
            "precision": "fp32" if precision is None else "bf16",
            "epochs": training_recipe(options.dataset, options.epochs).epochs,
            "sensitivity": "classifier",
            "sets": first.set_sizes(),
            "versions": record.versions(),
            "started": started.isoformat(timespec="seconds"),
            "wall_seconds": time.perf_counter() - began,
        },
        "methods": record.combine([result.entries for result in results]),
        "game": first.history,
        "noise_floor": record.mean_or_none([result.retraining_gap for result in results]),
        "runs": [result.facts(options.forget) for result in results] if options.repeats > 1 else None,
    }
    return report, first.networks


Saved = tuple[torch.nn.Module, dict[str, str]]


@dataclass(frozen=True)
class SeedResult:
    """One seed's numbers. retraining_gap: avg gap between two retrainings, measured with repeats."""

    seed: int
    split: Split
    entries: dict[str, dict[str, Any]]
    history: dict[str, Any] | None
    retraining_gap: float | None
    networks: dict[str, Saved]

    def set_sizes(self) -> dict[str, int]:
        names = ("train", "validation", "test", "forget", "retain")
        return {name: len(getattr(self.split, name)) for name in names}

    def facts(self, spec: str) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "forget": _forget_facts(spec, self.split),
            "methods": self.entries,
            "game": self.history,
            "retraining_gap": self.retraining_gap,
        }


def _run_seed(
    options: Options,
    seed: int,
    images: Images,
    forget: Forget,
    fresh: Any,
    given: tuple[Classifier, Any] | None,
    progress: Progress,
) -> SeedResult:
    """Everything one seed decides: split, original, every method, and their measures."""
    if given is not None and given[1] is not None:
        roles = given[1]
    else:
        shares = split_config(options.dataset)
        roles = hold_out(
            images.labels, images.test, seed,
            validation_share=shares.validation_share, test_share=shares.test_share,
            keep=() if given else forget.indices or (),
        )  # fmt: skip
    split = make_split(roles, images.labels, forget, seed).to(images.device)
    recipe = training_recipe(options.dataset, options.epochs)
    start = given[0] if given else fresh(generator_for(seed, "original", images.device).initial_seed())
    task = Task(images, split, seed, start, fresh, recipe, progress=progress)
    finished: dict[str, Finished] = {} if given else {"original": run(original.train, task)}
    ordered = [name for name in METHODS if name in options.methods]
    finished |= {name: run(method_named(name), task) for name in ordered}

    def measured(model: Classifier) -> Measures:
        return measure(model, images.batch, images.labels, split, task.generator("measures"))

    measures = {"original": measured(start)} | {n: measured(f.model) for n, f in finished.items()}
    reference = (measures["retrain"], finished["retrain"]) if "retrain" in finished else None
    again = None
    if reference and options.repeats > 1:
        again = avg_gap(measured(run(retrain.unlearn_again, task).model), reference[0])
    metadata = {"dataset": options.dataset, "arch": options.arch, "split": encode_roles(roles)}
    networks = {"original": start} | {name: f.model for name, f in finished.items()}
    return SeedResult(
        seed,
        split,
        {n: record.method_entry(m, finished.get(n), reference) for n, m in measures.items()},
        finished["dau"].history if "dau" in finished else None,
        again,
        {name: (model.network, metadata) for name, model in networks.items()},
    )


def _load_original(options: Options, images: Images, fresh: Any) -> tuple[Classifier, Any]:
    """The checkpoint's model, and the roles of the images when it was trained, if it says."""
    assert options.checkpoint is not None
    model = fresh(options.seed)
    metadata = models.load(options.checkpoint, model.network)
    if "split" in metadata:
        return model.eval(), decode_roles(metadata["split"], len(images.labels))
    print(
        f"{options.checkpoint} does not say which images it was trained on: taking this run's training "
        "images. If it has seen the validation images too, the result is not to be trusted.",
        file=sys.stderr,
    )
    return model.eval(), None


def _forget_facts(spec: str, split: Split) -> dict[str, Any]:
    indices: Tensor = split.forget
    return {
        "spec": spec, "count": len(indices), "sha256": split.forget_sha256, "indices": indices.tolist()
    }  # fmt: skip


def main() -> None:
    """Entry point: user mistakes become one line and exit code 2, Ctrl-C exit code 130."""
    torch.set_flush_denormal(True)  # before the first worker thread starts and inherits the mode
    try:
        command(standalone_mode=False)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except click.ClickException as error:
        sys.exit(_fail(error.format_message()))
    except (KeyboardInterrupt, click.Abort):
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
