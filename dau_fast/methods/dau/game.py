"""The game from start to end, on a copy of the original.

(1) The attacker learns to tell forget from validation on the frozen original. (2) Attacker and
defender take turns until the referee has seen enough. (3) The defender recovers what the game cost
it, on the retain set alone, with the learning rate decayed to zero. (4) BatchNorm statistics are
recomputed on the retain set, because the running ones still hold the forget set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from dau_fast.config import DauConfig, sample_size
from dau_fast.engine.batches import steps_for
from dau_fast.engine.optimizers import adam, sgd
from dau_fast.engine.profiling import optimizer_section, section
from dau_fast.engine.ranks import MicroBatch
from dau_fast.engine.steps import Compile, Players, Step
from dau_fast.engine.training import recompute_batchnorm, train
from dau_fast.methods.dau.attacker import Attacker, attacker_loss
from dau_fast.methods.dau.defender import defender_loss
from dau_fast.methods.dau.referee import History, Referee
from dau_fast.methods.dau.view import View
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier, Outputs


def unlearn(task: Task) -> Unlearned:
    """Make a copy of the original forget task.split.forget; settings["dau"] may hold a DauConfig."""
    config = _config(task)
    task = _sampled(task, config)
    defender = copy.deepcopy(task.original)
    with task.trainee(defender) as player:
        history = _play(player, task, config)
    return Unlearned(defender, asdict(history))


def _play(defender: Classifier, task: Task, config: DauConfig) -> History:
    """Game, recovery and statistics of `defender`, in place."""
    retain = task.split.retain
    game_steps = steps_for(config.game_epochs, len(retain), config.batch_size)
    recovery_steps = steps_for(config.recovery_epochs, len(retain), config.batch_size)
    advance = task.progress("dau", game_steps + recovery_steps)

    game = Game(defender, task, config, turns=game_steps)
    game.warm_up()
    look_every = max(1, round(game_steps / (config.game_epochs * config.looks_per_epoch)))
    for step in range(1, game_steps + 1):
        game.turn()
        advance()
        if step % look_every == 0 and game.referee.look(defender, game.attacker, step):
            break
    game.end()

    optimizer = _sgd(defender, task, config, config.recovery_lr)
    train(
        defender,
        task.feed("recovery", config.batch_size, retain),
        steps=recovery_steps,
        optimizer=optimizer,
        scheduler=LinearLR(optimizer, 1.0, 1 / recovery_steps, total_iters=recovery_steps),
        on_step=advance,
        engine=task.engine,
        name="recovery",
    )
    recompute_batchnorm(defender, task.images, retain, ranks=task.ranks)
    return game.referee.history


def _config(task: Task) -> DauConfig:
    given: DauConfig | None = task.settings.get("dau")
    if given is not None:
        return given
    split = task.split
    return DauConfig.default(
        classwise=split.classwise, retain_images=len(split.retain), pruned=task.masks is not None
    )


def _sampled(task: Task, config: DauConfig) -> Task:
    """`task` with as much of the retain set as `config` asks for."""
    retain = task.split.retain
    count = sample_size(len(retain), len(task.split.forget), config.retain_sample)
    some = _some(retain, count, task.generator("retain sample"))
    return replace(task, split=replace(task.split, retain=some))


def _some(index: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """`count` of `index` [N] in their order, all of it where it has no more."""
    if count >= len(index):
        return index
    order = torch.randperm(len(index), generator=chance, device=index.device)
    return index[order[:count]].sort().values


# Numbers that the attacker's warm-up holds of either set, half a GB in float32; of larger sets a sample.
_LESSON = 2**27


class Game:
    """Both players with their optimisers; a turn is one step of each, on one forward pass.

    turns: how many will be played at most.
    """

    def __init__(self, defender: Classifier, task: Task, config: DauConfig, turns: int = 1) -> None:
        self.config, self.task, self.defender, self.turns = config, task, defender, turns
        self.referee = Referee(
            task.split,
            task.labels,
            task.images,
            exam_share=config.exam_share,
            view=View(config.sensitivity, config.label_conditioned),
            generator=task.generator("exam"),
            ranks=task.ranks,
        )
        self._lesson = self._first_lesson()
        with torch.random.fork_rng():
            torch.manual_seed(task.generator("attacker").initial_seed())
            seen = torch.cat(self._lesson[:2])
            self.attacker = Attacker(seen, config.attacker_hidden).to(seen)
        self._attack = adam(self.attacker, lr=config.attacker_lr)
        self._defend = _sgd(defender, task, config, config.lr)
        split = task.split
        self._batches = task.feed("game", config.batch_size, split.retain, split.forget, split.validation)
        self._waiting = task.engine.waiting_of("game")
        self._step: Step | None = None

    def warm_up(self) -> None:
        """Train the attacker, once, on what the frozen original shows, and let the referee note it."""
        learn = self._learner(attacker_loss)
        for _ in range(self.config.warmup_steps):
            learn(*self._lesson)
        self._lesson = ()
        self.referee.look(self.defender, self.attacker, 0)

    def turn(self) -> None:
        """One defender pass over retain, forget and validation; the attacker steps, then the defender."""
        images, labels, index = self._waiting.batch(self._batches)
        inputs = images, labels, self.referee.study(index)
        self.defender.train()
        if self._step is None:
            self._step = self._prepared(inputs)
        self._step(*inputs)
        self._waiting.done(images.device)

    def end(self) -> None:
        """Let go of what only turns need: batches read ahead, buffers for gradients of several processes."""
        self._batches.close()
        self._step = None

    def _first_lesson(self) -> tuple[Tensor, ...]:
        """u of forget and validation set, or of some of either, and which of them may be studied."""
        chance, split = self.task.generator("lesson"), self.task.split
        most = lesson_size(self.defender.head.out_features, self.config)
        sets = [_some(index, most, chance) for index in (split.forget, split.validation)]
        shown = [self.referee.shown(self.defender, index) for index in sets]
        return *shown, *(self.referee.study(index) for index in sets)

    def _prepared(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Step:
        players = Players((self.defender, self.attacker), (self._attack, self._defend))
        # The other sensitivities take a gradient inside the pass.
        simple = self.config.sensitivity == "classifier"
        why = None if simple else f"sensitivity '{self.config.sensitivity}' cannot be compiled"
        engine = self.task.engine
        return engine.prepare("game", self._build, inputs, players, self.turns, compilable=why)

    def _build(self, compile: Compile) -> Step:
        """The turn: images and labels of the three sets, one after the other, and which may be studied."""
        config, defender, ranks = self.config, self.defender, self.task.ranks
        reveal, objective = compile(_reveal), compile(defender_loss)
        learn = self._learner(compile(attacker_loss))
        weights = {"alpha": config.alpha, "beta": config.beta, "lambd": config.lambd}
        judge = _frozen(self.attacker)
        called, parts, view = ranks.parallel(defender), self._parts(), self.referee.view
        forward = self.task.engine.forward(called, defender)

        def step(images: Tensor, labels: Tensor, study: Tensor) -> None:
            self._defend.zero_grad(set_to_none=True)
            for number, part in enumerate(parts):
                some, targets, may_study = (_rows(tensor, part.rows) for tensor in (images, labels, study))
                with ranks.sharing(called, part is parts[-1]):
                    with section("forward"):
                        sets, u_forget, u_validation = reveal(forward, defender, view, some, targets)
                    with section("attacker"):
                        seen = self._seen_by_all(u_forget, u_validation, may_study, part.sizes)
                        for _ in range(_share(config.attacker_steps, number, len(parts))):
                            learn(*seen)
                    with section("forward"):
                        retain_labels = targets.chunk(3)[0]
                        loss = objective(*sets, retain_labels, u_forget, judge, **weights, sizes=part.sizes)
                    with section("backward"):
                        (loss if part.weight == 1 else part.weight * loss).backward()
            with section(optimizer_section(self._defend)):
                self._defend.step()

        return step

    def _parts(self) -> list[MicroBatch]:
        ranks = self.task.ranks
        return ranks.micro_batches(ranks.rows(self.config.batch_size), self.task.engine.accumulate)

    def _seen_by_all(
        self, u_forget: Tensor, u_validation: Tensor, study: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """What the attacker learns from: u and study of forget and validation, of all processes' images."""
        _, study_forget, study_validation = study.chunk(3)
        columns = (u_forget.detach(), u_validation, study_forget, study_validation)
        if self.task.ranks.alone:
            return columns
        width = u_forget.shape[1]
        packed = torch.cat([*columns[:2], study_forget[:, None], study_validation[:, None]], 1)
        u_forget, u_validation, rest = self.task.ranks.gather(packed, sizes).split([width, width, 2], 1)
        return u_forget, u_validation, *rest.unbind(1)

    def _learner(self, objective: Callable[..., Tensor]) -> Step:
        """A step of the attacker on the arguments of `attacker_loss` but the first, by its `objective`."""

        def learn(*seen: Tensor) -> None:
            self._attack.zero_grad(set_to_none=True)
            objective(self.attacker, *seen).backward()
            self._attack.step()

        return learn


def lesson_size(classes: int, config: DauConfig) -> int:
    """How many images of either set the attacker's warm-up sees at most: their u, and four hidden layers."""
    return max(1, _LESSON // (classes + 1 + 4 * config.attacker_hidden))


def _frozen(attacker: Attacker) -> Attacker:
    """`attacker` with the weights that it has at any time, which take no gradient of the defender's loss."""
    judge = copy.deepcopy(attacker).requires_grad_(False)
    for weight, learned in zip(judge.parameters(), attacker.parameters(), strict=True):
        weight.data = learned.data
    return judge


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """`rows` of each of the three sets in `tensor` [3B, ...]."""
    if (rows.start, rows.stop) == (0, len(tensor) // 3):
        return tensor
    return torch.cat([part[rows] for part in tensor.chunk(3)])


def _share(steps: int, number: int, parts: int) -> int:
    """How many of the attacker's steps fall to part `number`."""
    return steps * (number + 1) // parts - steps * number // parts


def _reveal(
    forward: Callable[[Tensor], Outputs], defender: Classifier, view: View, images: Tensor, labels: Tensor
) -> tuple[tuple[Outputs, Outputs, Outputs], Tensor, Tensor]:
    """One pass over as many images of retain, forget and validation: outputs, and what the attacker sees.

    forward: how to call the defender. images [3B, ...], labels [3B]; u of forget with its graph, of
    validation without.
    """
    outputs = forward(images)
    retain, forget, validation = (
        Outputs(*part) for part in zip(*(tensor.chunk(3) for tensor in outputs), strict=True)
    )
    _, images_forget, images_validation = images.chunk(3)
    _, labels_forget, labels_validation = labels.chunk(3)
    u_forget = view.of(defender, images_forget, forget, labels_forget)
    with torch.no_grad():
        u_validation = view.of(defender, images_validation, validation, labels_validation)
    return (retain, forget, validation), u_forget, u_validation


def _sgd(model: Classifier, task: Task, config: DauConfig, lr: float) -> Optimizer:
    momentum, weight_decay = config.momentum, config.weight_decay
    return sgd(model.network, task.masks, lr=lr, momentum=momentum, weight_decay=weight_decay)
