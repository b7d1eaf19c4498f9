"""What CIFAR-10 with ResNet-18 is predicted to take on one NVIDIA H200, loop by loop.

A kernel takes the longest of three: its FLOPs over what convolutions reach, its bytes (every input read and
every output written once) over what such kernels reach, and what any kernel takes: in a replayed graph, or
where the host launches it. Kernels are counted on the step itself, with tensors that have no numbers; the
rates are those of a training step and of turns in benchmarks/records/2026-11-27-gpu, and of BatchNorm's own
kernels in benchmarks/records/2026-11-27-gpu-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dau_fast import models
from dau_fast.config import DauConfig, TrainingRecipe, fast_recipe
from dau_fast.cost import COUNTS, Sizes, count_equivalents, count_rival
from dau_fast.cost.passes import (
    departing_sizes,
    lesson_sizes,
    look_sizes,
    plan_schedule,
    ranked_images,
    split_norm_batches,
)
from dau_fast.data.images import Images
from dau_fast.data.split import Forget, hold_out, make_split
from dau_fast.engine.batches import steps_for
from dau_fast.engine.fused_layers import fused_layers
from dau_fast.methods.dau.difficulty import LESSON_IMAGES
from dau_fast.methods.dau.unseen import count_unseen
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.ops.batch_norm import FusedBatchNorm
from support.predicting import duration, markdown

# NVIDIA H200 SXM: a dense bf16 product of 8192 cubed and a copy of GBs reach about these of the 989 TFLOP/s
# and 4.8 TB/s of its data sheet.
PRODUCT_FLOPS, COPY_BYTES = 790e12, 4.3e12
# The share of a product's rate that convolutions of 64 to 512 channels reach in channels_last; those of a
# copy's that PyTorch's BatchNorm reaches, whose passes are more than one, and what else goes by element; and
# that the sums of `batch_norm` reach, and what it writes.
CONVOLUTIONS, BATCHNORM, BY_ELEMENT = 0.5, 0.21, 0.66
SUMS, WRITTEN = 0.45, 0.88
# Seconds of the shortest kernel in a graph, and of the host for each that it launches, autograd included.
SHORTEST, LAUNCH = 2.5e-6, 28e-6
# Assumed: of operations that are neither products nor convolutions, a compiler joins three into one, which
# then moves half of their bytes, as fast as what else goes by element.
JOINED, MOVED = 3, 0.5
# Seconds: of the plain model of the retain set, what it rates and what is made of that, of all three sets.
SHOWN = 0.17
# Kernels of an attacker's step; of a turn beside those of both networks (attacker's steps among them, what
# it sees, losses, updates), and of an anchor of logits in it; and of making a batch, which the host launches
# while the graph before it runs. A test holds them against real turns.
ATTACKER_KERNELS, TURN_KERNELS, LOGITS_KERNELS, BATCH_KERNELS = 37, 205, 15, 12
RETAIN, FORGET, VALIDATION, CLASSES, FEATURES = 40_500, 4500, 5000, 10, 512
# Bytes a parameter of a fused SGD step: gradient read, weight and momentum read and written.
UPDATE_BYTES = 20


@dataclass(frozen=True)
class Kernel:
    """flops: of a product or convolution, else 0. bytes: read and written. share: of a copy's rate."""

    flops: float
    bytes: float
    share: float = BY_ELEMENT


class Kernels(TorchDispatchMode):
    """What is launched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views launch nothing; fake tensors add operations of their own.
        name = func._schema.name
        if func.namespace == "dau_fast":
            self.seen += _norm_kernels(args, result)
        if func.namespace == "aten" and not func.is_view and "empty" not in name and "view" not in name:
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            moved = sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
            # The gradients of a convolution's input and of its weight are a kernel each.
            parts = 2 if "convolution_backward" in name else 1
            share = BATCHNORM if "batch_norm" in name else BY_ELEMENT
            self.seen += [Kernel(flops / parts, moved / parts, share)] * parts
        return result


def _norm_kernels(given: tuple[Any, ...], made: tuple[Tensor, ...]) -> list[Kernel]:
    """Of `batch_norm` or its backward pass: sums, what joins their parts, and what is written."""
    backward = len(made) == 3
    read = given[:3] if backward else given[:1]
    # In the forward pass what is added is read where the sum is written, and backward y where it was added.
    read = read[:2] if backward and not given[5] else read
    more = given[6:7] if not backward else ()
    sums = sum(x.nbytes for x in read)
    written = sum(x.nbytes for x in (*read, *more, *made[: 2 if backward else 1]) if x is not None)
    return [Kernel(0, sums, SUMS), Kernel(0, 0), Kernel(0, written, WRITTEN)]


@cache
def network_kernels(images: int, training: bool, fused: bool = False) -> tuple[Kernel, ...]:
    """A pass of ResNet-18 over so many images in bf16; with gradients and cross-entropy where it trains.

    fused: with BatchNorm and what follows it in one pass, as the engine has them in steps on CUDA.
    """
    layers = fused_layers if fused else nullcontext
    # A CPU, where the tensors are, has no kernels of that kind: its path is the other one.
    own = mock.patch("dau_fast.engine.fused_layers.batch_norm", _on_cuda)
    with FakeTensorMode(), own:
        model = Classifier(models.build("resnet18", CLASSES, (3, 32, 32)), precision=torch.bfloat16)
        model.train(training)
        x = torch.zeros(images, 3, 32, 32, dtype=torch.bfloat16)
        labels = torch.zeros(images, dtype=torch.int64)
        with torch.set_grad_enabled(training), Kernels() as kernels, layers(model):
            logits = model(x).logits
            if training:
                F.cross_entropy(logits, labels).backward()
    return tuple(kernels.seen)


def _on_cuda(*given: Any, add: Any, relu: bool, momentum: float, eps: float) -> Tensor:
    y: Tensor = FusedBatchNorm.apply(*given, add, relu, momentum, eps)
    return y


@cache
def parameters() -> int:
    with FakeTensorMode():
        return sum(p.numel() for p in models.build("resnet18", CLASSES, (3, 32, 32)).parameters())


def device_seconds(kernels: tuple[Kernel, ...], engine: str) -> float:
    """Of the device, by the engine that runs them."""
    shortest = LAUNCH if engine == "eager" else SHORTEST
    total, others = 0.0, []
    for kernel in kernels:
        if not kernel.flops and engine == "captured":
            others.append(kernel)
            continue
        work = kernel.flops / (CONVOLUTIONS * PRODUCT_FLOPS)
        share = 1.0 if kernel.flops else kernel.share
        total += max(work, kernel.bytes / (share * COPY_BYTES), shortest)
    for start in range(0, len(others), JOINED):
        moved = sum(kernel.bytes for kernel in others[start : start + JOINED])
        total += max(MOVED * moved / (BY_ELEMENT * COPY_BYTES), shortest)
    return total


def training_step(batch: int, engine: str) -> float:
    """Seconds of a step on `batch` images, its update and its batch included."""
    update = UPDATE_BYTES * parameters() / COPY_BYTES
    kernels = network_kernels(batch, True, engine != "captured")
    return max(device_seconds(kernels, engine) + update, _host(engine))


def turn(config: DauConfig, engine: str) -> float:
    """Seconds of a turn of the game."""
    shortest = LAUNCH if engine == "eager" else SHORTEST
    seconds = device_seconds(network_kernels(3 * config.batch_size, True, engine != "captured"), engine)
    if config.anchor:
        seconds += device_seconds(network_kernels(config.batch_size, False), engine)
    kernels = TURN_KERNELS + config.label_conditioned * LOGITS_KERNELS
    seconds += kernels * shortest + UPDATE_BYTES * parameters() / COPY_BYTES
    return max(seconds, _host(engine))


def _host(engine: str) -> float:
    """What the host takes to make a batch and to start a graph, while the one before runs."""
    return 0.0 if engine == "eager" else (BATCH_KERNELS + 2) * LAUNCH


def passes(images: int, batch: int, training: bool = False) -> float:
    """Seconds of passes forward, whose kernels the host launches."""
    return images / batch * device_seconds(network_kernels(batch, False), "eager")


# ---- what is predicted


@dataclass(frozen=True)
class Row:
    """A loop of a method. images: that pass; seconds: all of them."""

    method: str
    loop: str
    engine: str
    images: int
    seconds: float


def game_rows(classwise: bool, engine: str = "graphed") -> list[Row]:
    """The default game's loops."""
    config = DauConfig.default(classwise=classwise, retain_images=RETAIN, forget_images=FORGET)
    validation = 9 * VALIDATION // 10 if classwise else VALIDATION
    schedule = plan_schedule(config, forget=FORGET, retain=RETAIN, classes=CLASSES, features=FEATURES)
    lesson = sum(lesson_sizes(schedule, FORGET, validation))
    looks = schedule.looks * sum(look_sizes(schedule, FORGET, validation))
    norms = split_norm_batches(schedule.norm_images)
    statistics = sum(times * passes(size, size) for size, times in norms.items())
    name = "dau, class" if classwise else "dau, random 10 %"
    attacker = config.warmup_steps * ATTACKER_KERNELS * SHORTEST
    rated = measured = LESSON_IMAGES + FORGET + VALIDATION
    if not classwise:  # once more by a model that learned from both sets, and retain images to rank among
        rated += count_unseen(FORGET, LESSON_IMAGES, RETAIN)
        rated += FORGET + 2 * VALIDATION + ranked_images(schedule)
    asked = "where the class goes" if classwise else "difficulty, and what unseen images get"
    seconds = SHOWN * rated / measured + sum(
        times * passes(count, 500)
        for count, times in departing_sizes(
            config, schedule, FORGET, validation, classwise=classwise, pictures=True
        )
    )
    level = look_sizes(schedule, FORGET, validation)[-1] if classwise else 0
    looks += level
    return [
        Row(name, asked, "eager", rated, seconds),
        Row(name, "lesson and warm-up", "eager", lesson, passes(lesson, 500) + attacker),
        Row(name, "turns", engine, 3 * config.batch_size * config.turns, config.turns * turn(config, engine)),
        Row(name, "looks", "eager", looks, passes(looks, 500)),
        Row(name, "BatchNorm statistics", "eager", schedule.norm_images, statistics),
    ]


def retraining_rows() -> list[Row]:
    """Both retrainings: neither is worth the half minute that compiling takes."""
    rows = []
    for name, recipe in {"retrain": TrainingRecipe(), "retrain_fast": fast_recipe("cifar10")}.items():
        steps = steps_for(recipe.epochs, RETAIN, recipe.batch_size)
        seconds = steps * training_step(recipe.batch_size, "graphed")
        rows.append(Row(name, "training", "graphed", steps * recipe.batch_size, seconds))
    return rows


def one_gpu_tables() -> str:
    """By loop, and image equivalents of every method, as Markdown."""
    return f"{_loops()}\n\n{_equivalents()}"


def _loops() -> str:
    rows = []
    retraining = {row.method: row.seconds for row in retraining_rows()}
    for found in (game_rows(False), game_rows(True)):
        total = sum(row.seconds for row in found)
        rows += [_cells(row) for row in found]
        beside = ", ".join(
            f"{name} takes {seconds / total:.0f} times as long" for name, seconds in retraining.items()
        )
        rows.append((found[0].method, f"**all**: {beside}", "", "", f"**{duration(total)}**"))
    rows += [_cells(row) for row in retraining_rows()]
    return markdown(("method", "loop", "engine", "images", "seconds"), rows)


def _cells(row: Row) -> tuple[str, ...]:
    return row.method, row.loop, row.engine, f"{row.images:,}", f"{row.seconds:.3g}"


def _equivalents() -> str:
    """Of the defaults, random 10 % and a class, beside the literature's retraining."""
    columns = [default_equivalents(classwise) for classwise in (False, True)]
    full = [column["retrain"] for column in columns]
    names = sorted(columns[0], key=lambda name: -columns[0][name])
    rows = [
        (name, *(f"{column[name]:,.0f}, {whole / column[name]:.1f}x"
                 for column, whole in zip(columns, full, strict=True)))
        for name in names
    ]  # fmt: skip
    return markdown(("method", "random 10 %: image equivalents, retraining's over them", "class"), rows)


@cache
def default_equivalents(classwise: bool) -> Mapping[str, float]:
    """Image equivalents by method, each with the settings that it takes on CIFAR-10."""
    task = _cifar(classwise)
    split = task.split
    sizes = Sizes(len(split.forget), len(split.retain), len(split.validation), split.classwise)
    counts = {**asdict(sizes), "classes": CLASSES, "features": FEATURES, "batchnorm": True}
    recipes = {"retrain": TrainingRecipe(), "retrain_fast": fast_recipe("cifar10")}
    game = count_equivalents(get_method("dau").resolve(task), recipes, **counts)
    rivals = {name: count_rival(name, get_method(name).resolve(task), sizes) for name in COUNTS}
    return game.list_totals() | {name: count for name, count in rivals.items() if count is not None}


def _cifar(classwise: bool) -> Task:
    """A task of CIFAR-10's labels and sizes; its images are one, seen 60,000 times."""
    labels = torch.arange(60_000) % CLASSES
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(60_000, -1, -1, -1)
    names = tuple(str(label) for label in range(CLASSES))
    images = Images(pixels, labels, names, torch.arange(50_000, 60_000))
    roles = hold_out(labels, images.test, 0, validation_share=0.1, test_share=0.3)
    forget = Forget("class:3", label=3) if classwise else Forget("random:0.1", fraction=0.1)

    def build(_: int) -> Classifier:
        return Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, CLASSES)))

    return Task(images, make_split(roles, labels, forget, 0), 0, build(0), build, TrainingRecipe())
