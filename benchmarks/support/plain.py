"""The main job as research code usually writes it: the rival of whole runs.

PIL images behind a Dataset, torchvision transforms, DataLoaders, eager float32 steps in PyTorch's usual
memory format, losses by their definitions, exact support vector machines. Network, recipe, batch sizes,
number of steps and measures are those of dau_fast's run, so only the way is another.
"""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from dau_fast.engine.batches import steps_for
from support.plain_data import Job, Pictures, for_ever, loader
from support.plain_game import unlearn


def run(job: Job) -> dict[str, float]:
    """Train, retrain, unlearn, and measure the three; seconds by part."""
    seconds = {}
    began = time.perf_counter()

    def part(name: str) -> None:
        nonlocal began
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[name], began = now - began, now

    shown, plain = Pictures(job.images, augmented=True), Pictures(job.images, augmented=False)
    part("data")
    models = {}
    for name, index in (("original", job.split.train), ("retrain", job.split.retain)):
        network = models[name] = copy.deepcopy(job.network)
        train(network, shown, index, job)
        part(name)
    models["dau"] = unlearn(models["original"], shown, job)
    part("dau")
    for network in models.values():
        measure(network, plain, job)
    part("evaluation")
    return seconds


def train(network: nn.Module, data: Dataset[tuple[Any, ...]], index: Tensor, job: Job) -> None:
    """The recipe's epochs of SGD with step decay."""
    recipe = job.recipe
    batches = loader(data, index, recipe.batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    # As many steps as dau_fast takes, whose batches run on from one pass into the next.
    steps = steps_for(recipe.epochs, len(index), recipe.batch_size)
    milestones = [round(share * steps) for share in recipe.milestones]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    network.train()
    for images, labels in itertools.islice(for_ever(batches), steps):
        images, labels = images.to(job.device), labels.to(job.device)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        scheduler.step()


# ---- measuring


@torch.no_grad()
def measure(network: nn.Module, data: Dataset[tuple[Any, ...]], job: Job) -> dict[str, float]:
    """UA, RA, TA and five attacks in percent."""
    network.eval()
    seen = {}
    for name in ("forget", "retain", "test"):
        index = getattr(job.split, name)
        parts = [
            (network(images.to(job.device)).cpu(), labels)
            for images, labels in DataLoader(Subset(data, index.tolist()), 128)
        ]
        seen[name] = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    accuracy = {
        name: 100 * (logits.argmax(1) == labels).float().mean().item()
        for name, (logits, labels) in seen.items()
    }
    found = {"ua": 100 - accuracy["forget"], "ra": accuracy["retain"], "ta": accuracy["test"]}
    size = min(len(seen["retain"][1]), len(seen["test"][1]))
    some = torch.randperm(len(seen["retain"][1]))[:size]
    members = tuple(part[some] for part in seen["retain"])
    for name, score in SCORES.items():
        x = torch.cat([score(*members), score(*seen["test"])])
        y = torch.cat([torch.ones(size), torch.zeros(len(seen["test"][1]))])
        svm = SVC(C=3, gamma="auto", kernel="rbf").fit(x.numpy(), y.numpy())
        verdicts = svm.predict(score(*seen["forget"]).numpy())
        found[name] = float(100 * (verdicts == 0).mean())
    return found


def _log_p(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.double(), 1)


def _modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    p = _log_p(logits).exp()
    right = p.gather(1, labels[:, None])
    wrong = -(p * torch.log(1 - p + 1e-30)).scatter(1, labels[:, None], 0).sum(1, keepdim=True)
    return wrong - (1 - right) * torch.log(right + 1e-30)


SCORES = {
    "correctness": lambda logits, labels: (logits.argmax(1) == labels).double()[:, None],
    "confidence": lambda logits, labels: _log_p(logits).exp().gather(1, labels[:, None]),
    "entropy": lambda logits, _: -(_log_p(logits).exp() * _log_p(logits)).sum(1, keepdim=True),
    "modified_entropy": _modified_entropy,
    "probability": lambda logits, _: _log_p(logits).exp(),
}
