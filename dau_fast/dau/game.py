"""The game from start to end, on a copy of the original.

(1) The attacker learns to tell forget from validation on the frozen original. (2) Attacker and
defender take turns until the referee has seen enough. (3) The defender recovers what the game cost
it, on the retain set alone, with the learning rate decayed to zero. (4) BatchNorm statistics are
recomputed on the retain set, because the running ones still hold the forget set.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR

from dau_fast.config import DauConfig
from dau_fast.dau.attacker import Attacker, attacker_loss
from dau_fast.dau.defender import defender_loss
from dau_fast.dau.referee import Referee
from dau_fast.dau.view import View
from dau_fast.engine.batches import index_stream, steps_for
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.training import recompute_batchnorm, train
from dau_fast.models import Classifier, Outputs
from dau_fast.task import Task, Unlearned


def unlearn(task: Task) -> Unlearned:
    """Make a copy of the original forget task.split.forget; settings["dau"] may hold a DauConfig."""
    retain, load = task.split.retain, task.images.batch
    config = _config(task)
    defender = copy.deepcopy(task.original)
    game_steps = steps_for(config.game_epochs, len(retain), config.batch_size)
    recovery_steps = steps_for(config.recovery_epochs, len(retain), config.batch_size)
    advance = task.progress("dau", game_steps + recovery_steps)

    game = Game(defender, task, config)
    game.warm_up()
    look_every = max(1, round(game_steps / (config.game_epochs * config.looks_per_epoch)))
    for step in range(1, game_steps + 1):
        game.turn()
        advance()
        if step % look_every == 0 and game.referee.look(defender, game.attacker, step):
            break

    optimizer = _sgd(defender, task, config, config.recovery_lr)
    train(
        defender,
        index_stream(retain, config.batch_size, task.generator("recovery")),
        task.augmented("recovery"),
        task.labels,
        steps=recovery_steps,
        optimizer=optimizer,
        scheduler=LinearLR(optimizer, 1.0, 1 / recovery_steps, total_iters=recovery_steps),
        on_step=advance,
    )
    recompute_batchnorm(defender, load, retain)
    return Unlearned(defender, asdict(game.referee.history))


def prepare(task: Task) -> None:
    """Use the batch sizes of the game once, on a copy: the first use of one builds its kernels."""
    size = _config(task).batch_size
    model = copy.deepcopy(task.original).train()
    for count in (3 * size, size):
        index = task.split.train[:1].expand(count)
        model(task.images.batch(index)).logits.sum().backward()


def _config(task: Task) -> DauConfig:
    given: DauConfig | None = task.settings.get("dau")
    usual = DauConfig.default(classwise=task.split.classwise, retain_images=len(task.split.retain))
    return given or usual


class Game:
    """Both players with their optimisers; a turn is one step of each, on one forward pass."""

    def __init__(self, defender: Classifier, task: Task, config: DauConfig) -> None:
        self.config, self.task, self.defender = config, task, defender
        self.referee = Referee(
            task.split,
            task.labels,
            task.images.batch,
            exam_share=config.exam_share,
            view=View(config.sensitivity, config.label_conditioned),
            generator=task.generator("exam"),
        )
        self._original_shows = self.referee.shown(defender)
        with torch.random.fork_rng():
            torch.manual_seed(task.generator("attacker").initial_seed())
            seen = torch.cat(self._original_shows)
            self.attacker = Attacker(seen, config.attacker_hidden).to(seen.device)
        self._attack = Adam(self.attacker.parameters(), lr=config.attacker_lr, fused=True)
        self._defend = _sgd(defender, task, config, config.lr)
        self._load = task.augmented("game")
        self._batches = self._index_batches()

    def warm_up(self) -> None:
        """Train the attacker on what the frozen original shows, and let the referee note it."""
        split = self.task.split
        u_forget, u_validation = self._original_shows
        study = self.referee.study
        self._learn(
            study(u_forget, split.forget),
            study(u_validation, split.validation),
            self.config.warmup_steps,
        )
        self.referee.look(self.defender, self.attacker, 0)

    def turn(self) -> None:
        """One defender pass over retain, forget and validation; the attacker steps, then the defender."""
        config, labels = self.config, self.task.labels
        retain, forget, validation = next(self._batches)
        self.defender.train()
        images = self._load(torch.cat([retain, forget, validation]))
        outputs = self.defender(images)
        sizes = [len(retain), len(forget), len(validation)]
        o_retain, o_forget, o_validation = (
            Outputs(*part) for part in zip(*(tensor.split(sizes) for tensor in outputs), strict=True)
        )
        _, i_forget, i_validation = images.split(sizes)
        view, study = self.referee.view, self.referee.study
        u_forget = view.of(self.defender, i_forget, o_forget, labels[forget])
        with torch.no_grad():
            u_validation = view.of(self.defender, i_validation, o_validation, labels[validation])
        self._learn(study(u_forget.detach(), forget), study(u_validation, validation), config.attacker_steps)
        loss = defender_loss(
            o_retain,
            o_forget,
            o_validation,
            labels[retain],
            u_forget,
            self.attacker,
            alpha=config.alpha,
            beta=config.beta,
            lambd=config.lambd,
        )
        self._defend.zero_grad(set_to_none=True)
        # Naming the leaves keeps the attacker's parameters out of this backward pass.
        loss.backward(inputs=[p for p in self.defender.parameters() if p.requires_grad])
        self._defend.step()

    def _learn(self, u_forget: Tensor, u_validation: Tensor, steps: int) -> None:
        if not len(u_forget) or not len(u_validation):
            return  # the batch held exam images alone
        for _ in range(steps):
            self._attack.zero_grad(set_to_none=True)
            attacker_loss(self.attacker, u_forget, u_validation).backward()
            self._attack.step()

    def _index_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        config, split = self.config, self.task.split
        generator = self.task.generator("game")
        return zip(
            index_stream(split.retain, config.batch_size, generator),
            index_stream(split.forget, config.batch_size, generator),
            index_stream(split.validation, config.batch_size, generator),
            strict=True,
        )


def _sgd(model: Classifier, task: Task, config: DauConfig, lr: float) -> Optimizer:
    momentum, weight_decay = config.momentum, config.weight_decay
    return sgd(model.network, task.masks, lr=lr, momentum=momentum, weight_decay=weight_decay)
