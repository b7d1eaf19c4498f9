"""What unlearning costs, predicted: seconds and memory from sizes, and from constants of the machine.

`work` counts what the game does, exactly as dau/game.py does it and its referee never ends it early;
`fit` finds a machine's constants from measured runs, and `predict` multiplies the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dau_fast.config import DauConfig, sample_size
from dau_fast.engine.batches import steps_for
from dau_fast.methods.dau.game import lesson_size
from dau_fast.models import Classifier

# Images of a batch in evaluation: the defaults of View.over and recompute_batchnorm.
EVALUATION_BATCH = 512
# A backward pass costs two forward ones: gradients of inputs, and of weights.
_PASSES = 3
# DistributedDataParallel averages gradients in buckets: a first small one, the others of 25 MiB.
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20


@dataclass(frozen=True)
class Network:
    """A classifier, counted. flops: of a forward pass of one image. operations: kernels of a forward pass.

    activations: bytes that autograd keeps for an image. largest: bytes of the largest layer's output for
    one, logits left out. norms: BatchNorm layers; of all of them, channels, and normed: numbers of an image.
    """

    flops: float
    operations: int
    parameters: int
    features: int
    classes: int
    activations: float
    largest: float
    norms: int
    channels: int
    normed: float


@dataclass(frozen=True)
class Job:
    """One unlearning. forget, retain, validation: images. image_bytes: of one uint8 image.

    processes: that share every batch, each on a device of its own. number_bytes: of activations, 2 for
    bf16 under autocast. streamed: whether images stay off the device until they are needed.
    """

    network: Network
    config: DauConfig
    forget: int
    retain: int
    validation: int
    image_bytes: float
    processes: int = 1
    number_bytes: int = 4
    streamed: bool = False


@dataclass(frozen=True)
class Work:
    """What the first process does, which has the largest share.

    turns, recovery_steps: of the defender. looks: of the referee, the one at the original included.
    training_images: forward and backward. evaluated_images: shown to the referee. norm_images: of the
    BatchNorm pass. evaluation_batches: of both. attacker_steps; attacker_rows: forward and backward, in
    its own steps and in the defender's loss; judged_rows: forward, at looks. updates: parameters times
    steps. collectives, of all kinds; by ring algorithms, hops: messages one after the other, and
    wire_bytes: that a process sends.
    """

    turns: int
    recovery_steps: int
    looks: int
    training_images: int
    evaluated_images: int
    norm_images: int
    evaluation_batches: int
    attacker_steps: int
    attacker_rows: int
    judged_rows: int
    updates: int
    collectives: int
    hops: int
    wire_bytes: float


@dataclass(frozen=True)
class Machine:
    """Seconds a unit of work.

    training, evaluation: a FLOP of the defender. operation: a kernel that is launched, or a PyTorch call
    that is made. update: a parameter's update. attacker_step; attacker: a FLOP of the attacker. logit:
    what losses and attack features do with one. normed: what a synchronised BatchNorm takes longer for a
    number than an ordinary one. hop: a message's latency. byte: on the wire. start:
    once a job. processors: that processes share; None where each has a device of its own.
    """

    training: float
    evaluation: float
    operation: float
    update: float
    attacker_step: float
    attacker: float
    logit: float
    normed: float
    hop: float
    byte: float
    start: float
    processors: int | None = None


CONSTANTS = tuple(field.name for field in fields(Machine) if field.name != "processors")


@dataclass(frozen=True)
class Cost:
    """seconds, by constant of the machine. memory: bytes by part, of one process when it needs most."""

    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    phase: str

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())


def predict(job: Job, machine: Machine) -> Cost:
    """What `job` costs on `machine`."""
    amounts = amount(job, machine.processors)
    seconds = {name: count * getattr(machine, name) for name, count in amounts.items()}
    phase, parts = max(memory(job).items(), key=lambda item: sum(item[1].values()))
    return Cost(seconds, parts, phase)


# ---- work


def retain_images(job: Job) -> int:
    """How many images of the retain set are played with."""
    return sample_size(job.retain, job.forget, job.config.retain_sample)


def work(job: Job) -> Work:
    """The first process's share of `job`."""
    config, network, processes = job.config, job.network, job.processes
    retain, batch = retain_images(job), config.batch_size
    turns = steps_for(config.game_epochs, retain, batch)
    recovery = steps_for(config.recovery_epochs, retain, batch)
    look_every = max(1, round(turns / (config.game_epochs * config.looks_per_epoch)))
    looks = 1 + turns // look_every
    rows = _share(batch, processes)
    shows = looks * [job.forget, job.validation] + lesson(job)
    shown = [_share(count, processes) for count in shows]
    norm_batches = _norm_batches(job)
    norm_count = sum(norm_batches.values())
    attacker_steps = config.warmup_steps + turns * config.attacker_steps
    messages = list(_messages(job, turns, recovery, looks, norm_count))
    return Work(
        turns=turns,
        recovery_steps=recovery,
        looks=looks,
        training_images=(3 * turns + recovery) * rows,
        evaluated_images=sum(shown),
        norm_images=sum(times * _share(size, processes) for size, times in norm_batches.items()),
        evaluation_batches=sum(math.ceil(n / EVALUATION_BATCH) for n in shown) + norm_count,
        attacker_steps=attacker_steps,
        attacker_rows=config.warmup_steps * sum(lesson(job))
        + turns * (config.attacker_steps * 2 * batch + rows),
        judged_rows=sum(shown[:-2]),
        updates=(turns + recovery) * network.parameters,
        collectives=sum(times for times, _, _ in messages),
        hops=sum(times * hops for times, hops, _ in messages),
        wire_bytes=sum(times * size for times, _, size in messages),
    )


def lesson(job: Job) -> list[int]:
    """Images of forget and validation set that the attacker warms up on."""
    most = lesson_size(job.network.classes, job.config)
    return [min(count, most) for count in (job.forget, job.validation)]


def _share(count: int, processes: int) -> int:
    """The first process's part of `count` rows, as Ranks.rows deals them out."""
    return math.ceil(count / processes)


def _norm_batches(job: Job) -> dict[int, int]:
    """Batches of the BatchNorm pass over all processes: by their images, how many."""
    retain = retain_images(job)
    if not job.network.norms or retain < 2:
        return {}
    count = math.ceil(retain / EVALUATION_BATCH)
    size, larger = divmod(retain, count)
    return {size: count - larger} | ({size + 1: larger} if larger else {})


def _messages(
    job: Job, turns: int, recovery: int, looks: int, norm_count: int
) -> Iterator[tuple[int, int, float]]:
    """(how often, hops, bytes on the wire) of every kind of collective, in float32."""
    ranks, network, batch = job.processes, job.network, job.config.batch_size
    if ranks == 1:
        return

    def reduced(numbers: float) -> tuple[int, float]:
        return 2 * (ranks - 1), 2 * (ranks - 1) / ranks * 4 * numbers

    def gathered(rows: int, width: int) -> tuple[int, float]:
        return ranks - 1, (ranks - 1) * 4 * _share(rows, ranks) * width

    steps, norms, width = turns + recovery, network.norms, network.classes + 1
    buckets = 1 + max(0, math.ceil((4 * network.parameters - _FIRST_BUCKET) / _BUCKET))
    yield buckets * steps, *reduced(network.parameters / buckets)
    if norms:
        # Sums, then squares; in the backward pass both gradients at once. Every layer counts as a mean one.
        channels = network.channels / norms
        passes = steps + norm_count
        yield norms * passes, *reduced(channels + 1)
        yield norms * passes, *reduced(channels)
        yield norms * steps, *reduced(2 * channels)
    yield turns, *gathered(batch, 2 * width + 2)
    if batch < network.features:
        yield turns, *gathered(batch, 2 * network.features)
    else:
        yield 2 * turns, *reduced(2 * network.features)
        yield turns, *reduced(network.features**2)
    for shown, taught in zip((job.forget, job.validation), lesson(job), strict=True):
        yield 1, *gathered(taught, width)
        yield looks, *gathered(shown, 2)  # the attacker's score, and whether the label was right
    yield looks, 1, 1  # the first process's verdict
    yield 1, ranks - 1, (ranks - 1) * 8  # rows of a batch, by process


def amount(job: Job, processors: int | None = None) -> dict[str, float]:
    """By constant of Machine, how many units of it `job` takes.

    processors: where more processes than these share them, everything takes as many times longer: a
    message waits until the process that handles it has its turn.
    """
    done, network = work(job), job.network
    weights = (network.classes + 1 + job.config.attacker_hidden + 1) * job.config.attacker_hidden
    units = {
        "training": _PASSES * network.flops * done.training_images,
        "evaluation": network.flops * (done.evaluated_images + done.norm_images),
        "operation": network.operations
        * (_PASSES * (done.turns + done.recovery_steps) + done.evaluation_batches),
        "update": done.updates,
        "attacker_step": done.attacker_steps,
        "attacker": 2 * weights * (_PASSES * done.attacker_rows + done.judged_rows),
        "logit": network.classes * (done.training_images + done.evaluated_images),
        "normed": network.normed * (_PASSES * done.training_images + done.norm_images) * (job.processes > 1),
        "hop": done.hops,
        "byte": done.wire_bytes,
        "start": 1,
    }
    crowd = 1.0 if processors is None else max(1.0, job.processes / processors)
    return {name: count * crowd for name, count in units.items()}


# ---- memory

# Of an image, on every process: its label, its places in the split and in the order of a pass, its exam.
_IMAGE_BYTES = 5 * 8 + 1
# Results of a residual block's layers that are there at once, where no graph keeps them.
_LIVE = 4
# Numbers a row of logits takes in a step beside the network's own: in float32, as softmax, in u and as
# gradients of these.
_LOGIT_COPIES = 6
# The same at a look, without gradients: logits, u, and two of the attacker's forms of it.
_JUDGED_COPIES = 4


def memory(job: Job) -> dict[str, dict[str, float]]:
    """Bytes by part of what one process's device holds, in each phase of `job`."""
    config, network, ranks = job.config, job.network, job.processes
    parameters = 4.0 * network.parameters
    width = 4.0 * (network.classes + 1)
    rows = _share(config.batch_size, ranks)
    images = job.forget + job.retain + job.validation
    always = {
        "weights": 2 * parameters,  # the original's and the defender's
        "images": 0.0 if job.streamed else job.image_bytes * images,
        "labels and indices": float(_IMAGE_BYTES * images),
    }
    low = parameters / 4 * job.number_bytes if job.number_bytes < 4 else 0.0
    gathered = 0.0 if ranks == 1 else 2 * 2 * config.batch_size * width
    shared = always | {"gradients": parameters, "copies for the rehearsal": parameters, "low precision": low}
    evaluated = min(EVALUATION_BATCH, _share(max(job.forget, job.validation), ranks))
    playing = {"gradients": parameters, "optimiser state": parameters, "low precision": low}
    forget, validation = (width * count for count in lesson(job))
    hidden = 4.0 * 4 * config.attacker_hidden
    return {
        "warm-up of the attacker": always
        | {
            "u of the lesson": forget + validation,
            "attacker": max(2 * (forget + validation), forget + 2 * validation) + hidden * sum(lesson(job)),
        },
        "game": shared
        | {
            "optimiser state": parameters,
            "activations": 3 * rows * network.activations,
            "logits": 3 * rows * _LOGIT_COPIES * width + gathered,
        },
        "looks": always
        | playing
        | {
            "activations": evaluated * _LIVE * network.largest,
            "logits": evaluated * _JUDGED_COPIES * width,
        },
        "recovery": shared
        | {
            "optimiser state": 2 * parameters,  # the game's is still there
            "activations": rows * network.activations,
            "logits": rows * _LOGIT_COPIES * width,
        },
        "BatchNorm statistics": always
        | playing
        | {
            "optimiser state": 2 * parameters,
            "activations": max([0, *(_share(n, ranks) for n in _norm_batches(job))])
            * _LIVE
            * network.largest,
        },
    }


@dataclass(frozen=True)
class Breaking:
    """What fails first when all sets grow together. growth: the largest factor that works, 0 for none.

    part, phase: of memory, the part that is largest in the first phase that does not fit.
    """

    part: str
    phase: str
    growth: float


def what_breaks_first(job: Job, memory_bytes: float) -> Breaking:
    """Where `job` meets the limits of a device of `memory_bytes`; growth below 1: it already has."""
    if job.processes > job.config.batch_size:
        return Breaking("batch: fewer images than processes", "game", 0.0)

    def fits(factor: float) -> bool:
        return predict_memory(_grown(job, factor))[1] <= memory_bytes

    low, high = 1e-6, 1e6
    growth = 0.0
    if fits(low):
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if fits(middle) else (low, middle)
        growth = low
    phases = memory(_grown(job, high if growth else low))
    phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    return Breaking(max(parts, key=lambda name: parts[name]), phase, growth)


def predict_memory(job: Job) -> tuple[str, float]:
    """The phase that needs most memory, and its bytes."""
    totals = {phase: sum(parts.values()) for phase, parts in memory(job).items()}
    phase = max(totals, key=lambda name: totals[name])
    return phase, totals[phase]


def _grown(job: Job, factor: float) -> Job:
    """`job` with `factor` times the images in each set, at least one."""
    sizes = {name: max(1, round(factor * getattr(job, name))) for name in ("forget", "retain", "validation")}
    return replace(job, **sizes)


# ---- constants from measurements


def fit(measurements: Sequence[tuple[Job, float]], processors: int | None = None) -> Machine:
    """The machine whose predictions come closest to `measurements` (job, seconds), by relative error.

    Least squares with no constant below 0. A constant that no measurement needs is 0. Raises ValueError
    without measurements.
    """
    from scipy.optimize import nnls

    if not measurements:
        raise ValueError("no measurements to fit: give pairs of a job and its seconds")
    amounts = [[amount(job, processors)[name] for name in CONSTANTS] for job, _ in measurements]
    relative = np.array(amounts) / np.array([[seconds] for _, seconds in measurements])
    # Columns of one size: units differ by many orders of magnitude.
    scale = np.maximum(relative.max(0), np.finfo(float).tiny)
    found, _ = nnls(relative / scale, np.ones(len(measurements)))
    constants = dict(zip(CONSTANTS, (found / scale * (relative.max(0) > 0)).tolist(), strict=True))
    return Machine(**constants, processors=processors)


def constants(machine: Machine) -> dict[str, float]:
    """Seconds a unit, by name."""
    return {name: value for name, value in asdict(machine).items() if name in CONSTANTS}


# ---- counting a network


def count(model: Classifier, images: Tensor) -> Network:
    """`model` on `images` [B, ...], two or more, which may be fake tensors: nothing is computed then.

    FLOPs are those of convolutions and matrix products, as PyTorch counts them.
    """
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(images)
    with torch.no_grad(), _Dispatched(len(images), model.head.out_features) as calls:
        model(images)
    half = len(images) // 2
    # By difference: what is kept once a batch, such as weights in low precision, is no activation.
    activations = (_kept_by(model, images) - _kept_by(model, images[:half].clone())) / (len(images) - half)
    return Network(
        flops=flops.get_total_flops() / len(images),
        operations=calls.count,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        features=model.head.in_features,
        classes=model.head.out_features,
        activations=activations,
        largest=calls.largest / len(images),
        norms=len(norms),
        channels=sum(norm.num_features for norm in norms),
        normed=_normed(model, norms, images) / len(images),
    )


def _normed(model: Classifier, norms: Sequence[nn.Module], images: Tensor) -> int:
    """Numbers that come out of `norms` in a pass."""
    seen: list[int] = []

    def note(_: nn.Module, __: Any, out: Tensor) -> None:
        seen.append(out.numel())

    hooks = [norm.register_forward_hook(note) for norm in norms]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return sum(seen)


class _Dispatched(TorchDispatchMode):
    """Counts the operations that reach a device, and the bytes of the largest result of `rows` rows.

    classes: of logits, which do not count as such a result.
    """

    def __init__(self, rows: int, classes: int) -> None:
        super().__init__()
        self.rows, self.logits, self.count, self.largest = rows, (rows, classes), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views launch nothing; fake tensors add operations of their own.
        launches = func.namespace == "aten" and not func.is_view and "empty" not in func.__name__
        self.count += launches and "view" not in func.__name__
        if isinstance(result, Tensor) and result.shape[:1] == (self.rows,) and result.shape != self.logits:
            self.largest = max(self.largest, result.nbytes)
        return result


def _kept_by(model: Classifier, images: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Held here, so that no other storage gets its address.
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in kept.values())
