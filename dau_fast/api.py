"""Unlearning from Python, for a caller's own model and data."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dau_fast.data.progress import Progress, silent
from dau_fast.data.split import range_class_sizes
from dau_fast.engine.device import Stopwatch
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.runtime import Runtime, choose_device, choose_precision
from dau_fast.errors import UserError
from dau_fast.job.assembly import Outcome, carry_out, measure_model
from dau_fast.job.own import Given, Own, RetainSet, prepare
from dau_fast.methods.method import Method
from dau_fast.methods.plugins import row_of
from dau_fast.methods.registry import get_method
from dau_fast.metrics.unlearning import Measures, avg_gap
from dau_fast.prune import Masks


@dataclass(frozen=True)
class Reference:
    """A model that was retrained without what is to be forgotten. seconds: None where it was given."""

    model: nn.Module
    measures: Measures | None
    seconds: float | None


@dataclass(frozen=True, repr=False)
class Result:
    """An unlearned model and what it cost.

    model: a changed copy of the caller's network; the caller's is untouched. seconds: wall clock
    from call to finished weights; compile_seconds stands beside it. before, after: None without a
    test set. settings: that the method ran with. history: what the game recorded, None for other methods.
    retain_accuracy, validation_accuracy: percent, before and after, on some thousands of images at most.
    held_out: indices of `train`, or of forget and retain set together, that were taken for validation where
    no such set was given. reference: None where `retrain` was not given. A result goes in again in place of a
    model, and what it forgot stays forgotten.
    """

    model: nn.Module
    seconds: float
    compile_seconds: float
    before: Measures | None
    after: Measures | None
    settings: Any
    history: dict[str, Any] | None
    method: str = "dau"
    retain_accuracy: tuple[float, float] = (math.nan, math.nan)
    validation_accuracy: tuple[float, float] = (math.nan, math.nan)
    held_out: tuple[int, ...] = ()
    reference: Reference | None = None
    _following: Given | None = field(default=None, compare=False)
    _facts: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def avg_gap(self) -> float | None:
        """Mean distance of four rates to the reference's, in points; None without reference or test set."""
        if self.reference is None or self.reference.measures is None or self.after is None:
            return None
        return avg_gap(self.after, self.reference.measures)

    @property
    def forgotten(self) -> tuple[Any, ...]:
        """What this request and those before it forgot: sets, or indices of `train`, one entry a request."""
        return self._following.earlier if self._following else ()

    def __repr__(self) -> str:
        rates = [f"retain accuracy {_change(self.retain_accuracy)}"]
        if self.before and self.after:
            rates.insert(0, f"forget error {_change((self.before.ua, self.after.ua))}")
            rates.append(f"test accuracy {_change((self.before.ta, self.after.ta))}")
        else:
            rates.append(f"validation accuracy {_change(self.validation_accuracy)}")
        if self.avg_gap is not None:
            rates.append(f"avg gap {self.avg_gap:.2f}")
        return f"Result({self.method}: {', '.join(rates)}, {self.seconds:.1f} s)"

    def report(self, folder: str | Path) -> Path:
        """Write report.json, report.html and the model's weights to `folder`; the page's path.

        Raises UserError without a test set, on which a report's measures are taken.
        """
        from dau_fast.report.own import write_report  # what draws takes a while to import

        if self.after is None:
            raise UserError("a report needs measures: give a `test` set to unlearn with")
        return write_report(Path(folder), self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model's weights as model.safetensors, and a card, to `folder`.

        A model of transformers writes its configuration, too. Raises UserError where nothing can be written.
        """
        from dau_fast.report.own import save_pretrained

        save_pretrained(Path(folder), self)


def _change(rates: tuple[float, float]) -> str:
    return f"{rates[0]:.1f} → {rates[1]:.1f} %"


def unlearn(
    model: nn.Module | Result,
    *,
    forget: Any,
    retain: Any = None,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    config: Any = None,
    method: str | Callable[..., Any] = "dau",
    classifier: str | None = None,
    retrain: nn.Module | Callable[[RetainSet], nn.Module] | None = None,
    inplace: bool = False,
    seed: int = 0,
    masks: Masks | None = None,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    accumulate: int = 1,
    activation_checkpointing: bool = False,
    distributed: bool = False,
    shard: bool = False,
    stream: bool = False,
    progress: Progress = silent,
) -> Result:
    """Make a copy of `model` behave as if it had been trained without `forget`.

    model: maps inputs [B, ...] to logits [B, C], in a tensor, a tuple, a dict or an object with `.logits`,
    and ends in a Linear layer, which `classifier` names where several answer; or the result of a request
    before this one, whose sets are then taken where none are given. forget, retain: what the model was
    trained on, in two parts; or `train`, all of it, and as forget which of it: indices, a mask [N], names of
    files, ids, or the Path of a .csv, .txt, .json or .npy file of these. validation: never trained on; where
    there is none, a tenth of the retain set is held out for it, and a line says so. Each set is (inputs,
    labels) of tensors or arrays, inputs as the model takes them [N, ...], floating-point or int64 tokens, or
    a dict of several by name; or a map-style Dataset of such pairs or of dicts, as Hugging Face's are, or a
    DataLoader of one. Without `test` nothing is measured but accuracies on retain and validation set. method:
    "dau", "ft", "ga" or another that does not retrain, or a function of your own (`dau_fast.method`). config:
    the method's settings, such as a DauConfig, or a dict of some of its fields; None for the usual ones.
    retrain: makes a model of the retain set, a Dataset; or such a model: what others are held to. inplace:
    change `model` too. masks: of a pruned model, whose masked weights stay zero. precision: "auto" (bf16 on
    CUDA), "fp32", "bf16" or "fp64". engine: how training steps run, "auto" or one of
    dau_fast.engine.runtime.ENGINES. accumulate: parts a batch is taken in, one after the other, to save
    memory. activation_checkpointing: compute blocks' activations again in the backward pass, which saves more
    of it and takes longer. distributed: whether all processes of torch.distributed's default group make this
    call together, with the same model and sets, each on a device of its own; each has the result. shard:
    whether each of them holds no more than its share of what is trained: weights, gradients and the
    optimiser's state. stream: read images while training, ahead of the steps, and hold none; otherwise all
    sets are held on `device`. Both give the same where a Dataset's items stay the same. One thread calls the
    Datasets, which so need not be safe for several; it is not the caller's. Labels are those in `targets` or
    `labels` of a Dataset (or of the one that a Subset is of), as torchvision's have them; where there are
    none, or where the first item differs from them, every item is read once before.
    Raises UserError (a ValueError) for settings out of range, for sets that do not fit together or do not
    fit the model, and for an item that a Dataset raises an error for.
    """
    chosen = _choose_method(method)
    place = choose_device(device)
    runtime = Runtime(
        place, choose_precision(precision, place), engine, _join_ranks(distributed), accumulate,
        activation_checkpointing=activation_checkpointing, shard=shard,
    )  # fmt: skip
    sets = {"retain": retain, "train": train, "validation": validation, "test": test}
    network, given = _follow(model, forget, sets)
    own = prepare(network, given, runtime, classifier, masks, seed=seed, stream=stream, progress=progress)
    return _perform(network, own, chosen, config, retrain, inplace=inplace)


def _perform(
    model: nn.Module, own: Own, method: Method[Any], config: Any, retrain: Any, *, inplace: bool
) -> Result:
    """Run `method` on what was prepared of `model`, and look at what came of it."""
    started, began = datetime.now(UTC), time.perf_counter()
    outcome = carry_out(own.task, [method], {method.name: config})
    reference = _take_reference(retrain, own)
    result = _make_result(model, method, outcome, own, reference, inplace=inplace)
    return replace(result, _facts=_note(own, method, outcome, started, time.perf_counter() - began))


def _follow(model: nn.Module | Result, forget: Any, sets: dict[str, Any]) -> tuple[nn.Module, Given]:
    """The network, and what is given, with what a request before this one left."""
    if not isinstance(model, Result):
        if not isinstance(model, nn.Module):
            raise UserError(f"the model is a {type(model).__name__}: expected a torch.nn.Module, or a Result")
        return model, Given(forget, **sets)
    before = model._following
    if before is None:
        raise UserError("this result does not say what it forgot: give its model, and the sets")
    asked = {name: data for name, data in sets.items() if data is not None}
    if before.train is None and "retain" not in asked:
        raise UserError(
            "the request before this one was given `retain`: give what is left of it, without this `forget`"
        )
    if before.train is not None and {"train", "retain"} & asked.keys():
        raise UserError(
            "the request before this one was given `train`, whose indices say what is forgotten: leave "
            "`train` and `retain` out"
        )
    return model.model, replace(before, forget=forget, **asked)


def _take_reference(retrain: Any, own: Own) -> Reference | None:
    """The retrained model: given, or made of the retain set here, with the clock on."""
    if retrain is None:
        return None
    task, seconds = own.task, None
    if isinstance(retrain, nn.Module):
        made = retrain
    else:
        with Stopwatch(task.images.device) as watch:
            made = retrain(RetainSet(task.images, task.split.retain, own.layout))
        seconds = watch.seconds
    if not isinstance(made, nn.Module):
        raise UserError(f"`retrain` made a {type(made).__name__}: expected a torch.nn.Module")
    measures = measure_model(own.fit(made), task) if len(task.split.test) else None
    return Reference(made, measures, seconds)


def _make_result(
    model: nn.Module,
    method: Method[Any],
    outcome: Outcome,
    own: Own,
    reference: Reference | None,
    *,
    inplace: bool,
) -> Result:
    """What the caller of `method` gets: a copy of `model` with the finished weights, or `model` itself."""
    finished = outcome.finished[method.name]
    before, after = own.look(own.task.original), own.look(finished.model)
    _warn_of_ruin(method, before[0], after[0], len(own.task.split.retain))
    network = model if inplace else copy.deepcopy(model)
    network.load_state_dict(finished.model.network.state_dict())
    asked = own.task.split.forget.tolist()
    return Result(
        network,
        finished.seconds,
        finished.compile_seconds,
        outcome.measures.get("original"),
        outcome.measures.get(method.name),
        outcome.settings[method.name],
        finished.history,
        method.name,
        (before[0], after[0]),
        (before[1], after[1]),
        own.drawn,
        reference,
        own.given.after(asked, own.drawn),
    )


# Points of retain accuracy that a method may cost without a word, and, beyond two standard errors, at all;
# images that are too few to say anything.
_COST, _LOSS, _FEW = 1.0, 2.0, 4


def _warn_of_ruin(method: Method[Any], before: float, after: float, count: int) -> None:
    """A line where the model knows less of what it was to keep; the game never returns a ruined one."""
    lost, error = before - after, math.sqrt(before * (100 - before) / count)
    log = logging.getLogger("dau_fast")
    if lost * count / 100 < _FEW + 0.5:
        return
    if lost > _LOSS + 2 * error:
        log.warning(
            "%s ruined the model: it was right on %.1f %% of the retain set, and now is on %.1f %%; use "
            "another method or smaller steps (`config`)",
            method.name, before, after,
        )  # fmt: skip
    elif lost > _COST:
        log.warning(
            "%s cost the model more than it should: it was right on %.1f %% of the retain set, and now is on "
            "%.1f %%; smaller steps (`lr` in `config`) cost less",
            method.name, before, after,
        )  # fmt: skip


def _note(
    own: Own, method: Method[Any], outcome: Outcome, started: datetime, seconds: float
) -> dict[str, Any]:
    """What a report needs beside the result, without holding on to images and models."""
    task, finished = own.task, outcome.finished[method.name]
    return {
        "split": task.split.to(torch.device("cpu")),
        "class_sizes": range_class_sizes(task.split, task.labels),
        "forgotten_classes": [task.images.class_names[i] for i in task.labels[task.split.forget].tolist()],
        "seed": task.seed,
        "runtime": task.runtime,
        "loops": finished.loops,
        "method": method,
        "masked": task.pruned,
        "started": started,
        "wall_seconds": seconds,
    }


def _choose_method(asked: str | Callable[..., Any]) -> Method[Any]:
    chosen = row_of(asked) if callable(asked) else get_method(asked)
    if chosen.reference:
        raise UserError(
            f"method '{chosen.name}' needs the recipe the model was trained by: retrain it yourself, and "
            "give it as `retrain`"
        )
    return chosen


def _join_ranks(distributed: bool) -> Ranks:
    if not distributed:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            "`distributed=True` without a process group: call torch.distributed.init_process_group first, or "
            "leave it out"
        )
    return Ranks.from_group()
