"""Jobs that nobody has run yet, the GPUs assumed for them, and the tables of what they would cost.

No constant here was measured by us: they are the maker's figures for one chip, times the share of its peak
that is assumed to be reached. Networks are counted as they are, on fake tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dau_fast import models
from dau_fast.config import DauConfig
from dau_fast.cost import Job, Machine, Network, count_network, predict, predict_memory, what_breaks_first
from dau_fast.models import Classifier

# NVIDIA H100 SXM, its data sheet: dense bf16, float32, memory, NVLink in one direction. Between machines
# one 400 Gbit/s InfiniBand port a GPU, as in NVIDIA's DGX H100.
PEAK_FLOPS, FLOAT32_FLOPS, MEMORY, MEMORY_BYTES_PER_SECOND = 989e12, 67e12, 80e9, 3.35e12
NVLINK_BYTES_PER_SECOND, NETWORK_BYTES_PER_SECOND, GPUS_A_MACHINE = 450e9, 50e9, 8
# Assumed. Shares of the peak: convolutions of ResNet-50 with their BatchNorms wait for memory, large
# products do not. Launching a kernel from Python, the latency of a small collective, and the share of a
# link that is used.
CONVOLUTIONS, PRODUCTS = 0.10, 0.40
LAUNCH_SECONDS, COLLECTIVE_SECONDS, LINK_SHARE = 10e-6, 30e-6, 0.7
# Kernels of an attacker's step, and bytes that pass through memory for a parameter's update, for a logit of a
# training image (losses, attack features and their gradients in float32).
ATTACKER_KERNELS, UPDATE_BYTES, LOGIT_BYTES = 60, 20, 60

GPUS = (1, 8, 64)
SIDE, IMAGENET, VALIDATION_SHARE = 224, 1_281_167, 0.1
RETAIN_SAMPLE = 10.0


@dataclass(frozen=True)
class Scenario:
    """A network on ImageNet's images. share: of the training images that are forgotten."""

    title: str
    arch: str
    classes: int
    utilisation: float
    share: float


SCENARIOS = (
    Scenario("ResNet-50, 1,000 classes", "resnet50", 1000, CONVOLUTIONS, 0.01),
    Scenario("ResNet-50, 1,000 classes", "resnet50", 1000, CONVOLUTIONS, 0.1),
    Scenario("ViT-L/16, 1,000 classes", "vit_l_16", 1000, PRODUCTS, 0.01),
    Scenario("ViT-L/16, 1,000 classes", "vit_l_16", 1000, PRODUCTS, 0.1),
    Scenario("ResNet-50, 128,000 classes", "resnet50", 128_000, CONVOLUTIONS, 0.01),
    Scenario("ResNet-50, 128,000 classes", "resnet50", 128_000, CONVOLUTIONS, 0.1),
)


@cache
def network(arch: str, classes: int) -> Network:
    """Counted in bf16 under autocast, without weights."""

    def as_it_is(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    # Initialising a transformer looks at values, which fake tensors do not have.
    with FakeTensorMode(), mock.patch("torch.nn.init.trunc_normal_", as_it_is):
        model = Classifier(models.build(arch, classes, (3, SIDE, SIDE)), precision=torch.bfloat16)
        return count_network(model, torch.zeros(8, 3, SIDE, SIDE))


def job(scenario: Scenario, processes: int, *, sampled: bool = False, streamed: bool = False) -> Job:
    """Validation images come from the training part, as in a run."""
    validation = round(VALIDATION_SHARE * IMAGENET)
    train = IMAGENET - validation
    forget = round(scenario.share * train)
    sample = RETAIN_SAMPLE if sampled else None
    config = DauConfig.default(
        classwise=False, retain_images=train - forget, forget_images=forget, retain_sample=sample
    )
    return Job(
        network(scenario.arch, scenario.classes), config, forget, train - forget, validation,
        3 * SIDE * SIDE, processes, 2, streamed,
    )  # fmt: skip


def gpus(utilisation: float, processes: int) -> Machine:
    """`processes` GPUs, one a process."""
    link = NVLINK_BYTES_PER_SECOND if processes <= GPUS_A_MACHINE else NETWORK_BYTES_PER_SECOND
    flop = 1 / (utilisation * PEAK_FLOPS)
    return Machine(
        training=flop,
        evaluation=flop,
        operation=LAUNCH_SECONDS,
        update=UPDATE_BYTES / MEMORY_BYTES_PER_SECOND,
        attacker_step=ATTACKER_KERNELS * LAUNCH_SECONDS,
        attacker=1 / (PRODUCTS * FLOAT32_FLOPS),
        logit=LOGIT_BYTES / MEMORY_BYTES_PER_SECOND,
        normed=0.0,  # on GPUs both are one kernel or two
        # A collective's latency grows little with the number of GPUs, which do not go round in one ring.
        hop=COLLECTIVE_SECONDS / (2 * (processes - 1)) if processes > 1 else 0.0,
        byte=1 / (LINK_SHARE * link),
        start=0.0,
    )


# ---- tables


def tables() -> str:
    """What every scenario costs, as Markdown."""
    return "\n\n".join((_networks(), _costs(), _limits()))


def _networks() -> str:
    rows = []
    for arch, classes in dict.fromkeys((one.arch, one.classes) for one in SCENARIOS):
        found = network(arch, classes)
        name = next(one.title for one in SCENARIOS if (one.arch, one.classes) == (arch, classes))
        rows.append((
            name, f"{found.flops / 1e9:.1f}", f"{found.parameters / 1e6:.1f}",
            f"{found.activations / 1e6:.0f}", str(found.operations), str(found.norms),
        ))  # fmt: skip
    head = ("network", "GFLOP, one image forward", "million parameters", "MB of activations an image",
            "kernels, forward", "BatchNorm layers")  # fmt: skip
    return markdown(head, rows)


def _costs() -> str:
    rows = []
    for scenario in SCENARIOS:
        for processes in GPUS:
            machine = gpus(scenario.utilisation, processes)
            whole = predict(job(scenario, processes), machine)
            sampled = predict(job(scenario, processes, sampled=True), machine)
            longest = max(whole.seconds, key=lambda name: whole.seconds[name])
            rows.append((
                scenario.title, f"{100 * scenario.share:g} %", str(processes), duration(whole.total_seconds),
                duration(sampled.total_seconds),
                f"{PARTS[longest]}, {100 * whole.seconds[longest] / whole.total_seconds:.0f} %",
            ))  # fmt: skip
    head = ("network", "forgotten", "GPUs", "all of the retain set", f"retain sample {RETAIN_SAMPLE:g}",
            "most time, all of the retain set")  # fmt: skip
    return markdown(head, rows)


def _limits() -> str:
    rows = []
    for scenario in SCENARIOS:
        for processes in GPUS:
            cells = [scenario.title, f"{100 * scenario.share:g} %", str(processes)]
            for streamed in (False, True):
                one = job(scenario, processes, streamed=streamed)
                total = predict_memory(one)[1]
                first = what_breaks_first(one, MEMORY)
                cells += [f"{total / 1e9:.0f}", f"{first.part} ({first.phase}), {_times(first.growth)}"]
            rows.append(tuple(cells))
    head = ("network", "forgotten", "GPUs", "GB a GPU, images on it", "breaks first, at times these images",
            "GB a GPU, images streamed", "breaks first, at times these images")  # fmt: skip
    return markdown(head, rows)


# What a constant of Machine pays for.
PARTS = {
    "training": "training passes", "evaluation": "evaluation passes", "operation": "launching kernels",
    "update": "updates", "attacker_step": "launching the attacker's kernels",
    "attacker": "attacker's products", "logit": "softmax and losses", "normed": "synchronised BatchNorm",
    "hop": "latency of collectives", "byte": "bytes between GPUs", "start": "start",
}  # fmt: skip


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows))


def duration(seconds: float) -> str:
    """Two figures and a unit."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{_two(seconds / size)} {unit}"
    return f"{_two(seconds)} s"


def _two(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _times(growth: float) -> str:
    return f"{_two(growth)}x" if growth else "whatever their number"
