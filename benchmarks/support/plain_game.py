"""The game as research code usually writes it, by its equations: the rival of dau_fast's own.

Settings, steps and what is drawn how often are those of dau_fast's game, so only the way is another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from dau_fast.config import DauConfig
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.methods.dau.difficulty import draw_lesson, fit_plain_model, rate_difficulty
from support.plain_data import Batch, Job, Pictures, for_ever, loader
from support.plain_departures import depart


class Rated(Dataset[tuple[Any, ...]]):
    """The same pairs, each with what the game wants to know of it, by the package's plain model.

    That is how hard the image is, how much it says to the attacker, and the probabilities of where it goes.
    """

    def __init__(self, pictures: Pictures, job: Job, original: nn.Module) -> None:
        self.pictures, config, split, labels = pictures, job.config, job.split, job.images.labels
        classes, chance = len(job.images.class_names), torch.Generator(job.device).manual_seed(0)
        self.difficulty, self.counts = torch.zeros(len(labels)), torch.ones(len(labels))
        self.targets = torch.zeros(len(labels), classes)
        if not config.asks_plain and not config.departure:
            return
        lesson = draw_lesson(split, chance)
        model = fit_plain_model(job.images, lesson, labels, classes, chance)
        assert model is not None
        if config.difficulty:
            for index in (split.forget, split.validation):
                (found,) = rate_difficulty(model, job.images, index, [labels])
                self.difficulty[index.cpu()] = found.cpu()
        if config.departure:
            targets, counts = depart(original, model, lesson, job)
            self.targets[split.forget.cpu()], self.counts[split.validation.cpu()] = targets, counts

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return *self.pictures[index], self.difficulty[index], self.counts[index], self.targets[index]


def unlearn(original: nn.Module, pictures: Pictures, job: Job) -> nn.Module:
    """The game, and statistics of BatchNorm over as much of the retain set as the game takes."""
    config, split = job.config, job.split
    network, data = copy.deepcopy(original), Rated(pictures, job, original)
    game = Game(network, original, job, show_all(network, data, job))
    sets = (split.retain, split.forget, split.validation)
    streams = [endless(data, index, config.batch_size) for index in sets]
    some = split.retain[torch.randperm(len(split.retain))[: config.norm_images].to(split.retain.device)]
    last = config.turns - round(config.settled * config.turns)
    for turn, *batches in zip(range(config.turns), *streams, strict=False):
        if turn == last:
            _take_statistics(network, loader(pictures, some, min(128, len(some))), job)
            game.settled = True
        game.turn(*(tuple(column.to(job.device) for column in batch) for batch in batches))
    if not game.settled:
        _take_statistics(network, loader(pictures, some, min(128, len(some))), job)
    if game.gone is not None:
        _level(network, job, game.gone, some[: config.look_images])
    return network


def _take_statistics(network: nn.Module, batches: DataLoader[Batch], job: Job) -> None:
    torch.optim.swa_utils.update_bn(batches, network, device=job.device)


@torch.no_grad()
def _level(network: nn.Module, job: Job, gone: Tensor, index: Tensor) -> None:
    """Classes that are gone get the mean of the least logit of those that stay, for any image."""
    logits = torch.cat([network.eval()(job.images.batch(part)) for part in index.split(128)])
    head = network.get_submodule(job.head)
    head.weight[gone] = 0.0
    head.bias[gone] = logits.index_fill(1, gone, torch.inf).amin(1).mean()


def endless(data: Dataset[tuple[Any, ...]], index: Tensor, batch_size: int) -> Iterator[Batch]:
    """Batches for ever, also of a set smaller than one."""
    subset = Subset(data, index.tolist())
    sampler = RandomSampler(
        subset, replacement=len(subset) < batch_size, num_samples=max(len(subset), batch_size)
    )
    return for_ever(DataLoader(subset, batch_size, sampler=sampler, drop_last=True))


class Game:
    """Attacker and defender, and the original as a teacher.

    seen: what the attacker sees of forget and validation set at the start, and how much the latter says.
    """

    def __init__(
        self, network: nn.Module, original: nn.Module, job: Job, seen: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        config = self.config = job.config
        self.network, self.original, self.settled = network, original.eval(), False
        self.head = network.get_submodule(job.head)
        self.gone = job.images.labels[job.split.forget].unique() if job.split.classwise else None
        self.attacker = Attacker(torch.cat(seen[:2]), config.attacker_hidden).to(seen[0])
        self.attack = torch.optim.Adam(self.attacker.parameters(), config.attacker_lr)
        self.defend = torch.optim.SGD(
            network.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.decay = torch.optim.lr_scheduler.LinearLR(self.defend, 1.0, 1 / config.turns, config.turns)
        shown = [u[:, 1] for u in seen[:2]] if config.label_conditioned else _class_margins(original, job)
        exposed, self.anchor_logits = exposure(*shown), 0.0
        if config.label_conditioned:
            fewest = min(map(len, shown))
            sure = fewest / (fewest + config.half_sure)
            weight = max(exposed, sure) ** 2
            if self.gone is None:
                self.anchor_logits = config.anchor_logits * max(0.0, 1 - exposed / sure)
        else:
            weight = min(1.0, exposed / 0.6) ** 2
        self.alpha = config.alpha * weight
        self.departure = config.departure * (weight if config.label_conditioned else 1.0)
        for _ in range(config.warmup_steps):
            self.learn(*seen)

    def learn(self, u_forget: Tensor, u_validation: Tensor, says: Tensor) -> None:
        members, others = self.attacker(u_forget), self.attacker(u_validation)
        loss = F.binary_cross_entropy_with_logits(members, torch.ones_like(members))
        wrong = F.binary_cross_entropy_with_logits(others, torch.zeros_like(others), reduction="none")
        loss = loss + (says * wrong).sum() / says.sum()
        self.attack.zero_grad()
        (loss / 2).backward()
        self.attack.step()

    def turn(self, retain: Batch, forget: Batch, validation: Batch) -> None:
        """One step of both players on one pass over the three batches, of what `Rated` gives."""
        config = self.config
        self.network.train()
        for module in self.network.modules():
            if self.settled and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        images = torch.cat([retain[0], forget[0], validation[0]])
        features, logits = _features_and_logits(self.network, self.head, images)
        sizes = [len(batch[1]) for batch in (retain, forget, validation)]
        z_retain, z_forget, z_validation = logits.split(sizes)
        _, h_forget, h_validation = features.split(sizes)
        z_pulled, h_pulled = z_forget.clone(), h_forget.clone()
        if config.pull:
            z_pulled.register_hook(_limited(config.pull / len(z_pulled)))
        if config.pull and config.features:
            h_pulled.register_hook(_limited(0.5 * config.pull / len(h_pulled)))
        u_forget = show(z_pulled, h_pulled, *forget[1:3], config)
        u_validation = show(z_validation, h_validation, *validation[1:3], config)
        for _ in range(config.attacker_steps):
            self.learn(u_forget.detach(), u_validation.detach(), validation[3])
        loss = F.cross_entropy(z_retain, retain[1])
        loss = loss - self.alpha * F.logsigmoid(-self.attacker(u_forget)).mean()
        if config.anchor:
            taught = self.teach(retain[0])
            loss = loss + config.anchor * divergence(taught, z_retain)
            if self.anchor_logits:
                apart = taught - z_retain
                squared = (apart - apart.mean(1, keepdim=True)).pow(2).sum(1).mean()
                loss = loss + config.anchor * self.anchor_logits * squared
        if config.departure:
            loss = loss + self.departure * divergence(forget[4].log(), z_forget)
        if config.beta:
            loss = loss + config.beta * barlow_twins(h_forget, h_validation, config.lambd)
        self.defend.zero_grad()
        loss.backward()
        self.defend.step()
        self.decay.step()

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The original's logits, without classes that are gone."""
        logits = self.original(images)
        return logits if self.gone is None else logits.index_fill(1, self.gone, -torch.inf)


def _limited(limit: float) -> Callable[[Tensor], Tensor]:
    return lambda g: g * (limit / g.norm(dim=1, keepdim=True).clamp(min=limit))


@torch.no_grad()
def _class_margins(original: nn.Module, job: Job) -> list[Tensor]:
    """Of retain and validation images, as validation has none of a class that is gone."""
    found = []
    for index in (job.split.retain, job.split.validation):
        some = index[torch.randperm(len(index))[: job.config.look_images].to(index.device)]
        log_p = torch.cat([original(job.images.batch(part)).log_softmax(1) for part in some.split(128)])
        right = F.one_hot(job.images.labels[some], log_p.shape[1]).bool()
        found.append(log_p[right] - log_p.masked_fill(right, -torch.inf).logsumexp(1))
    return found


def exposure(members: Tensor, others: Tensor) -> float:
    """How far margins tell members from others: 2 AUC - 1 over all pairs, at least 0.05."""
    above = members[:, None] - others[None, :]
    return max(0.05, float(above.sign().double().mean()))


def divergence(taught: Tensor, logits: Tensor) -> Tensor:
    """KL of softmax(taught) from softmax(logits), the mean over rows."""
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(taught, 1), reduction="batchmean")


def _features_and_logits(network: nn.Module, head: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    features: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    logits = network(images)
    handle.remove()
    return features[0], logits


def show(logits: Tensor, features: Tensor, labels: Tensor, difficulty: Tensor, config: DauConfig) -> Tensor:
    """What the attacker sees, [B, U]: of the label, or of all classes but it; sensitivity and difficulty."""
    right = F.one_hot(labels, logits.shape[1]).bool()
    if config.label_conditioned:
        log_p = F.log_softmax(logits, 1)
        p_right = (log_p.exp() * right).sum(1).clamp(2e-9, 1 - 1e-6)
        margin = torch.log(p_right) - torch.log(1 - p_right)
        columns = [torch.log(p_right), margin, entropy(log_p)]
        u = torch.cat([torch.stack(columns, 1), right.to(logits)], 1)
    else:
        log_q = F.log_softmax(logits.masked_fill(right, -1e4), 1)
        u = torch.cat([log_q.topk(min(2, logits.shape[1] - 1), 1).values, entropy(log_q)[:, None]], 1)
    u = torch.cat([u, features], 1) if config.features else u
    if config.sensitivity != "none":
        seen = labels if config.label_conditioned else logits.argmax(1)
        error = F.softmax(logits, 1) - F.one_hot(seen, logits.shape[1])
        norm = (error.square().sum(1) + 1e-20).sqrt() * (features.square().sum(1) + 1).sqrt()
        u = torch.cat([u, torch.log(norm + 1e-3).unsqueeze(1)], 1)
    return torch.cat([u, difficulty.unsqueeze(1).to(u)], 1) if config.difficulty else u


def entropy(log_p: Tensor) -> Tensor:
    """Its logarithm, of distributions [B, C]."""
    return torch.log(-(log_p.exp() * log_p).sum(1) + 1e-4)


def barlow_twins(a: Tensor, b: Tensor, lambd: float) -> Tensor:
    """Cross-correlation against the identity, off the diagonal weighed by `lambd`."""
    a = (a - a.mean(0)) / (a.std(0, correction=0) + 1e-5)
    b = (b - b.mean(0)) / (b.std(0, correction=0) + 1e-5)
    c = a.T @ b / len(a)
    on = torch.diagonal(c).add(-1).square().sum()
    return on + lambd * (c.square().sum() - torch.diagonal(c).square().sum())


@torch.no_grad()
def show_all(network: nn.Module, data: Rated, job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """What the attacker sees of the whole forget and validation set, and how much the latter says."""
    network.eval()
    head = network.get_submodule(job.head)
    found = []
    for index in (job.split.forget, job.split.validation):
        parts = []
        for images, labels, rated, *_ in DataLoader(Subset(data, index.tolist()), 128):
            features, logits = _features_and_logits(network, head, images.to(job.device))
            parts.append(show(logits, features, labels.to(job.device), rated.to(job.device), job.config))
        found.append(torch.cat(parts))
    return found[0], found[1], data.counts[job.split.validation.cpu()].to(job.device)
