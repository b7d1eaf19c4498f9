"""What a model that never saw the forget set would say of it, as research code usually writes it.

By the equations of dau_fast's game, on its plain model: the rival's part of what happens before the turns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.methods.dau.difficulty import PlainModel
from support.plain_data import Job

# Logits [n, C] to log-probabilities without what an image may not be.
Leave = Callable[[Tensor], Tensor]


@torch.no_grad()
def depart(original: nn.Module, model: PlainModel, lesson: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    """Probabilities of where forget images go [F, C], and how much each validation image says, [V].

    model: of the retain images `lesson`.
    """
    original.eval()
    return (_leave if job.split.classwise else _unlearn)(original, model, lesson, job)


def _leave(original: nn.Module, model: PlainModel, _: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    """Of classes that are gone."""
    split, labels, share = job.split, job.images.labels, job.config.plain_share
    gone, right = labels[split.forget].unique(), labels[split.validation]

    def without(logits: Tensor) -> Tensor:
        return logits.cpu().index_fill(1, gone.cpu(), -1e4).log_softmax(1)

    targets = without(_answers(original, split.forget, job))
    if share:
        temperature = _temperature(without, _answers(model, split.validation, job), right)
        believed = without(_answers(model, split.forget, job) / temperature)
        targets = _join(without, targets, believed, share)
    targets = targets.exp()
    held = torch.bincount(right.cpu(), minlength=targets.shape[1]) / len(right)
    return targets, (targets.mean(0) / held).clamp(max=10)[right.cpu()]


def _unlearn(original: nn.Module, model: PlainModel, lesson: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    """Of images spread over classes."""
    split, labels, share = job.split, job.images.labels.cpu(), job.config.plain_share
    forget, validation = labels[split.forget.cpu()], labels[split.validation.cpu()]
    rows = torch.randperm(len(lesson))[: job.config.look_images]
    some = lesson[rows.to(lesson.device)]
    others = labels[some.cpu()]

    def without(logits: Tensor) -> Tensor:
        return logits.cpu().scatter(1, forget[:, None], -1e4).log_softmax(1)

    near, near_others = (_beside(original, index, job) for index in (split.forget, some))
    signs = [(_mean_margins(near, forget), _mean_margins(near_others, others))]
    targets, loss = without(torch.stack([z.log_softmax(1) for z in near]).mean(0)), 0.0
    if share:
        said, alone, rated = (_answers(model, index, job) for index in (split.forget, some, split.validation))
        wanted = F.one_hot(others, alone.shape[1])
        alone = wanted - (wanted - alone) / (1 - model.leverages.cpu()[rows])[:, None]
        signs.append((_lead(said, forget), _lead(alone, others)))
        temperature = _temperature(lambda z: z.cpu().log_softmax(1), rated, validation)
        targets = _join(without, targets, without(said / temperature), share)
        loss = _loss(model, lesson, rated, job)
    among = torch.stack([_scores(there, there) for _, there in signs]).mean(0)
    heights = _scores(torch.stack([_scores(here, there) for here, there in signs]).mean(0), among)
    margins = _mean_margins([_answers(original, split.validation, job)], validation)
    expected = torch.quantile(margins, torch.as_tensor(norm.cdf(heights - loss)).to(margins))
    chosen = expected.sigmoid()[:, None]
    right = F.one_hot(forget, targets.shape[1]).bool()
    return torch.where(right, chosen, (1 - chosen) * targets.exp()), _weigh(margins, expected)


def _answers(network: nn.Module, index: Tensor, job: Job) -> Tensor:
    return torch.cat([network(job.images.batch(part)).cpu() for part in index.split(128)])


def _beside(original: nn.Module, index: Tensor, job: Job) -> list[Tensor]:
    """Logits of pictures moved by a sixteenth up, down, left and right; of other inputs as they are."""
    shape = job.images.shape
    if len(shape) != 3 or min(shape[1:]) < 4:
        return [_answers(original, index, job)]
    moves = [(step * max(1, round(shape[axis] / 16)), axis + 1) for axis in (1, 2) for step in (1, -1)]
    return [
        torch.cat([
            original(job.images.batch(part).roll(*move)).cpu() for part in index.split(128)
        ])
        for move in moves
    ]  # fmt: skip


def _mean_margins(logits: list[Tensor], labels: Tensor) -> Tensor:
    found = []
    for z in logits:
        right = F.one_hot(labels, z.shape[1]).bool()
        log_p = z.log_softmax(1)
        found.append(log_p[right] - log_p.masked_fill(right, -torch.inf).logsumexp(1))
    return torch.stack(found).mean(0)


def _lead(scores: Tensor, labels: Tensor) -> Tensor:
    """Of the label over the best of the others."""
    right = F.one_hot(labels, scores.shape[1]).bool()
    return scores[right] - scores.masked_fill(right, -torch.inf).amax(1)


def _scores(values: Tensor, among: Tensor) -> Tensor:
    """Normal scores of ranks, the middle one of equals."""
    below, to = ((compare(among[None, :], values[:, None])).sum(1) for compare in (torch.lt, torch.le))
    return torch.as_tensor(norm.ppf(((below + to) / 2 + 0.5) / (len(among) + 1)), dtype=values.dtype)


def _loss(model: PlainModel, lesson: Tensor, rated: Tensor, job: Job) -> float:
    """Twice what a plain model without the forget set loses, in standard deviations of validation margins."""
    split, labels = job.split, job.images.labels
    others = len(split.train) - len(split.forget)
    count = max(1, round(len(lesson) * len(split.forget) / others))
    both = torch.cat([lesson, split.forget[torch.randperm(len(split.forget))[:count].to(lesson.device)]])
    seen = torch.cat([model.features(job.images.batch(part)) for part in both.split(128)])
    informed = PlainModel(model.features, seen, labels[both], rated.shape[1])
    right = labels[split.validation].cpu()
    before, after = _lead(_answers(informed, split.validation, job), right), _lead(rated, right)
    return 2 * float((before - after).mean() / before.std(correction=0))


def _temperature(without: Leave, scores: Tensor, labels: Tensor) -> float:
    tried = [10 ** (step / 10) for step in range(-30, 11)]
    likely = [float(without(scores / t).gather(1, labels.cpu()[:, None]).mean()) for t in tried]
    return tried[likely.index(max(likely))]


def _join(without: Leave, one: Tensor, other: Tensor, share: float) -> Tensor:
    wanted = ((1 - share) * one.exp() + share * other.exp()).sum(0)
    found = without(2 * ((1 - share) * one + share * other))
    for _ in range(30):
        found = without(found + wanted.log() - found.logsumexp(0))
    return found


def _weigh(margins: Tensor, expected: Tensor) -> Tensor:
    """Tenths of validation by its margins, each as a whole as much as forget images are expected there."""
    edges = torch.quantile(margins, torch.arange(1, 10) / 10)
    place, there = torch.bucketize(margins, edges), torch.bucketize(expected.contiguous(), edges)
    held = torch.bincount(place, minlength=10) / len(margins)
    wanted = (torch.bincount(there, minlength=10) + 1) / (len(expected) + 10)
    return (wanted / held).clamp(max=10)[place].float()
