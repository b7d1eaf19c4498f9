"""The game (Sharma et al. 2024, arXiv 2402.06864), played on a copy of the original.

    the attacker sees   u(x) = what the defender says of x: margin, entropy, label (or the others),
                          and how hard x is for a plain model of the retain set                       (1)
    attacker step       maximise E_f log A(u) + E_v log(1 - A(u))                                     (2)
    defender step       minimise CE(retain) + kappa E_r KL(teacher || defender)
                          + alpha E_f[-log(1 - A(u))] + delta E_f KL(target || defender)
                          + beta L_BT(h_f, h_v)                                                       (3)

The teacher is the original without the classes that are gone, and the target what a model that never saw the
forget images would say of them.
The attacker first learns on the frozen original. Then both take turns, each on one forward pass, in one
phase: the learning rate falls to zero over the whole game, so that it forgets first and settles at the end.
BatchNorm statistics, which still hold the forget set, are taken anew: at the end, or where the last turns
begin. Where the model was ruined, the game is played again from the original: longer, once, or with smaller
steps where little was left of it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from dau_fast.config import DauConfig
from dau_fast.data.split import draw_sample
from dau_fast.engine.batches import Batch
from dau_fast.engine.chance import seeded
from dau_fast.engine.loop import Forward, Loop, LoopCost, PartLoss, run_loop
from dau_fast.engine.modes import find_batchnorms
from dau_fast.engine.optimizers import adam, sgd
from dau_fast.engine.profiling import section
from dau_fast.engine.ranks import MicroBatch
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.steps import Compile, Players, prepare
from dau_fast.engine.training import recompute_batchnorm
from dau_fast.errors import Ruined
from dau_fast.methods.dau.attacker import Attacker, attacker_gradients, auc
from dau_fast.methods.dau.defender import defender_loss
from dau_fast.methods.dau.departure import level_gone, mark_gone
from dau_fast.methods.dau.referee import History, Referee
from dau_fast.methods.dau.rows import choose_rows
from dau_fast.methods.dau.schedule import Schedule
from dau_fast.methods.dau.shown import Shown, prepare_shown
from dau_fast.methods.dau.view import View, reveal_turn
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier

# What margins do not show an attacker may still see.
_LEAST_EXPOSURE = 0.05
# From where on a class is known by heart, and its attacker's weight is whole.
_WHOLLY_EXPOSED = 0.6
# Games at most, and how many times as many turns, once, or as large steps the next one has.
_GAMES, _LONGER, _SMALLER = 4, 2, 0.25


def unlearn(task: Task, config: DauConfig) -> Unlearned:
    """Make a copy of the original forget task.split.forget.

    Raises Ruined where every game ruined it.
    """
    task, _ = plan_game(task, config)
    shown = prepare_shown(task, config)
    loops: tuple[LoopCost, ...] = ()
    turns: list[int] = []
    for _ in range(_GAMES):
        defender, costs, referee = _play(task, config, shown)
        loops, turns = loops + costs, [*turns, config.turns]
        if not referee.finds_ruin():
            played = {"lr": config.lr, "turns": turns}
            return Unlearned(defender, loops, asdict(referee.history) | played)
        known, last = referee.history.retain_accuracy, config
        logging.getLogger("dau_fast").warning(
            "a game of %d turns with lr %g ruined the model: it knew %.1f %% of the retain set, and then "
            "%.1f %%", config.turns, config.lr, known[0], known[-1],
        )  # fmt: skip
        if len(set(turns)) > 1 or referee.finds_collapse():
            config = replace(config, lr=config.lr * _SMALLER)
        else:
            config = replace(config, turns=config.turns * _LONGER)
    raise Ruined(
        f"every game ruined the model, the last of {last.turns} turns with `lr={last.lr:g}`: take a smaller "
        "`alpha` or `lr`, or more `turns`"
    )


def plan_game(task: Task, config: DauConfig) -> tuple[Task, Schedule]:
    """`task` with as much of the retain set as `config` asks for, and how long its game lasts."""
    split, classes = task.split, task.original.head.out_features
    columns = View.of(config).count_columns(classes, task.original.head.in_features)
    schedule = Schedule.plan(config, retain=len(split.retain), forget=len(split.forget), columns=columns)
    retain = draw_sample(split.retain, schedule.retain_images, task.generator("retain sample"))
    return replace(task, split=replace(split, retain=retain)), schedule


def _play(task: Task, config: DauConfig, shown: Shown) -> tuple[Classifier, tuple[LoopCost, ...], Referee]:
    """A whole game: the changed copy, what its loop cost, and who watched it."""
    _, schedule = plan_game(task, config)  # a sample's sample is all of it
    defender = copy.deepcopy(task.original)
    with (
        task.teacher() as original,
        task.trainee(defender) as player,
        Game(player, original, task, config, schedule, shown) as game,
    ):
        game.warm_up()
        loops = game.play(task.progress("dau", schedule.turns))
        game.finish()
    return defender, loops, game.referee


class Game:
    """Both players with their optimisers, and the referee; a context, whose batches end with it.

    defender: the model that is changed in place. original: what it was, which stays. schedule: of this game,
    on the retain set of `task`. shown: to the attacker of every image.
    """

    attacker: Attacker

    def __init__(
        self,
        defender: Classifier,
        original: Classifier,
        task: Task,
        config: DauConfig,
        schedule: Schedule,
        shown: Shown,
    ) -> None:
        self.defender, self.original = defender, original
        self.task, self.config, self.schedule, self.shown = task, config, schedule, shown
        self.taken = 0  # turns
        split = task.split
        self.view = View.of(config, difficulty=shown.difficulty is not None)
        self.referee = Referee(
            split, task.labels, task.images, exam_share=config.exam_share, look_images=config.look_images,
            view=self.view, shown=shown, generator=task.generator("exam"), ranks=task.ranks,
        )  # fmt: skip
        self.gone = mark_gone(task)
        self._settles = schedule.settled_turns > 0 and bool(find_batchnorms(defender))
        self._defend = _sgd(defender, task, config)
        self._decay = LinearLR(self._defend, 1.0, 1 / schedule.turns, total_iters=schedule.turns)
        self._asked = torch.zeros(len(task.labels), device=task.labels.device)
        self._asked[split.forget] = 1
        self._held = torch.zeros_like(self._asked)
        self._held[split.earlier] = 1
        # How much each image says to the attacker, 0 for those that it may not learn from.
        granted = self.referee.grant_study(torch.arange(len(task.labels), device=task.labels.device))
        self._study = granted * shown.departures.counts if shown.departures else granted
        rows = choose_rows(split, config.batch_size, task.generator("filler"))
        sets = split.retain, rows, split.validation
        # Of two unrelated images Barlow Twins says nothing: see docs/method.md.
        classes = shown.departures.classes if shown.departures else shown.labels
        pairs = classes if config.beta else None
        self._batches = task.feed("game", config.batch_size, *sets, paired_by=pairs)

    def __enter__(self) -> Game:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    @property
    def history(self) -> History:
        """What the referee saw."""
        return self.referee.history

    def warm_up(self) -> None:
        """Make the attacker and train it on what the frozen original shows; the referee notes it."""
        split, chance = self.task.split, self.task.generator("lesson")
        sets = [
            draw_sample(index, self.schedule.lesson_images, chance)
            for index in (split.forget, split.validation)
        ]
        u_forget, u_validation = (self.referee.reveal(self.defender, index) for index in sets)
        may_study = [self._study[index] for index in sets]
        seen = torch.cat([u_forget, u_validation])
        with seeded(self.task.derive_seed("attacker"), seen.device):
            self.attacker = Attacker(seen, self.config.attacker_hidden).to(seen)
        self._attack = adam(self.attacker, lr=self.config.attacker_lr)
        self._weigh_verdict(u_forget, u_validation)
        seen_apart = (u_forget, u_validation, *may_study)
        learn = self._prepare_lesson(seen_apart)
        for _ in range(self.config.warmup_steps):
            learn(*seen_apart)
        self.referee.look(self.defender, self.attacker, 0)

    def _prepare_lesson(self, seen: tuple[Tensor, ...]) -> Callable[..., None]:
        """A step of the attacker on `seen`: kernels so small that on CUDA launching them takes longest."""
        learn, runtime = self._learner(attacker_gradients), self.task.runtime
        if runtime.device.type != "cuda" or not runtime.ranks.alone or runtime.engine == "eager":
            return learn
        players = Players((self.attacker,), (self._attack,))
        how, steps = Runtime(runtime.device, engine="auto"), self.config.warmup_steps
        return prepare("warm-up", lambda _, parts: learn, seen, players, steps, how).step

    def _weigh_verdict(self, u_forget: Tensor, u_validation: Tensor) -> None:
        """Decide how much it counts what is said of the forget set, by what the attacker sees of both sets.

        An attacker that learned what is not there would push the defender for nothing, and ruin it. What
        many images show is there, however little it is; but then a push takes the sureness of all images.
        """
        config, split = self.config, self.task.split
        self.departure, self.anchor_logits = config.departure, 0.0
        if self.view.label_conditioned:
            fewest = min(len(split.forget), len(split.validation))
            sure = fewest / (fewest + config.half_sure)
            exposed = self._note_exposure(u_forget[:, 1], u_validation[:, 1])
            weight = max(exposed, sure) ** 2
            self.departure *= weight
            if not self.gone.any():  # the logits of classes that are gone are not to stay
                self.anchor_logits = config.anchor_logits * max(0.0, 1 - exposed / sure)
        else:
            weight = min(1.0, self._note_exposure(*self._show_margins()) / _WHOLLY_EXPOSED) ** 2
        self.alpha = config.alpha * weight

    def _note_exposure(self, members: Tensor, others: Tensor) -> float:
        """How far the original's margins tell members from others: 1 for surely, never less than a little."""
        exposed = max(_LEAST_EXPOSURE, 2 * auc(members, others) - 1)
        self.history.exposure = exposed
        return exposed

    def _show_margins(self) -> tuple[Tensor, Tensor]:
        """Of retain images as members, as validation has none of a class that is gone, and of validation."""
        task, most, chance = self.task, self.schedule.look_images, self.task.generator("exposure")
        sets = (draw_sample(index, most, chance) for index in (task.split.retain, task.split.validation))
        retain, validation = (
            View().reveal_all(self.defender, task.images, index, task.labels, ranks=task.ranks)[:, 1]
            for index in sets
        )
        return retain, validation

    def play(self, advance: Callable[[], None] = lambda: None) -> tuple[LoopCost, ...]:
        """Take all turns, after `warm_up`, unless the referee ends it; `advance` is called after each."""
        runtime, last = self.task.runtime, self.schedule.settled_turns
        if not self._settles:
            return run_loop(self.make_loop(advance), runtime)
        costs = run_loop(self.make_loop(advance, turns=self.schedule.turns - last), runtime)
        if self.referee.ended:
            return costs
        self._take_statistics()
        return costs + run_loop(self.make_loop(advance, turns=last, settled=True), runtime)

    def finish(self) -> None:
        """Take BatchNorm's statistics, unless the last turns were played with them, and look once more."""
        if not self._settles:
            self._take_statistics()
        if self.shown.departures and self.task.split.classwise:
            level_gone(self.defender, self.task, self.gone, self.schedule.look_images)
        self.referee.look(self.defender, self.attacker, self.taken)

    def _take_statistics(self) -> None:
        """BatchNorm's, of the retain set alone, as training sees it."""
        task = self.task
        index = draw_sample(task.split.retain, self.schedule.norm_images, task.generator("statistics sample"))
        noise, load = task.derive_seed("statistics noise"), task.load_augmented("statistics")
        recompute_batchnorm(self.defender, load, index, ranks=task.ranks, seed=noise)

    def make_loop(
        self, advance: Callable[[], None] = lambda: None, *, turns: int | None = None, settled: bool = False
    ) -> Loop:
        """The next `turns` as a loop, after `warm_up`; all by default. settled: with BatchNorm at rest."""

        def after(_: int) -> bool:
            self.taken += 1
            self._decay.step()
            advance()
            due = self.taken % self.schedule.look_every == 0 and self.taken < self.schedule.turns
            return due and self.referee.look(self.defender, self.attacker, self.taken)

        # Some sensitivities take a gradient inside the pass.
        simple = self.config.sensitivity in ("none", "classifier")
        return Loop(
            "game",
            self.defender,
            self._defend,
            self._batches,
            turns or self.schedule.turns,
            loss=self._build_turn,
            inputs=self._show,
            after=after,
            sets=3,
            partners=(self.attacker,),
            their_optimizers=(self._attack,),
            compilable=None if simple else f"sensitivity '{self.config.sensitivity}' cannot be compiled",
            seed=self.task.derive_seed("settling noise" if settled else "game noise"),
            settled=settled,
        )

    def _show(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images of all sets, what the attacker is shown, how much it says, what is to go, and to stay gone.

        Last, where to, if there is such.
        """
        index = batch.indices
        asked, held = self._asked[index], self._held[index]
        labels, difficulty = self.shown.labels[index], self.shown.rate(index)
        rated = asked if difficulty is None else difficulty
        departures = self.shown.departures
        targets = (departures.look_up(index),) if departures else ()
        return batch.images, labels, rated, self._study[index], asked, held, *targets

    def _build_turn(self, compile: Compile, forward: Forward) -> PartLoss:
        """One turn on a part of a batch: reveal, attacker steps, and the loss of the defender's step."""
        config, gone = self.config, self.gone
        weights = {"alpha": self.alpha, "departure": self.departure, "anchor_logits": self.anchor_logits}
        taught_sets = 1 + (len(self.task.split.earlier) > 0)
        reveal, objective, teach = compile(reveal_turn), compile(defender_loss), compile(_teach)
        learn, judge = self._learner(compile(attacker_gradients)), _frozen(self.attacker)

        def turn(
            part: MicroBatch, images: Tensor, labels: Tensor, rated: Tensor, study: Tensor, asked: Tensor,
            held: Tensor, *targets: Tensor,
        ) -> Tensor:  # fmt: skip
            limit = config.pull * part.weight / (len(images) // 3)  # gradients are those of a mean
            with section("forward"):
                # (1)
                sets, u_forget, u_validation = reveal(
                    forward, self.defender, self.view, images, labels, rated, limit
                )
                taught = teach(self.original, images, taught_sets) if config.anchor else None
            with section("attacker"):
                seen = self._gather(u_forget, u_validation, study, part.sizes)
                for _ in range(_deal(config.attacker_steps, part.number, part.count)):
                    learn(*seen)  # (2)
            with section("forward"):
                retain_labels, of_forget, of_earlier = labels.chunk(3)[0], asked.chunk(3)[1], held.chunk(3)[1]
                departures = targets[0].chunk(3)[1] if targets else None
                loss: Tensor = objective(
                    sets, retain_labels, u_forget, of_forget, of_earlier, judge, taught, gone, departures,
                    **weights, config=config, sizes=part.sizes,
                )  # fmt: skip
            return loss  # (3)

        return turn

    def _gather(
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

    def _learner(self, gradients: Callable[..., list[Tensor]]) -> Callable[..., None]:
        """A step of the attacker on the arguments of `attacker_gradients` but the first."""

        def learn(*seen: Tensor) -> None:
            found = gradients(self.attacker, *seen)
            for parameter, gradient in zip(self.attacker.parameters(), found, strict=True):
                parameter.grad = gradient
            self._attack.step()

        return learn


@torch.no_grad()
def _teach(original: Classifier, images: Tensor, sets: int) -> Tensor:
    """The original's logits [sets B, C] on the first `sets` of the three in `images` [3B, ...]."""
    logits: Tensor = original(images[: sets * (len(images) // 3)]).logits
    return logits


def _frozen(attacker: Attacker) -> Attacker:
    """`attacker` with the weights that it has at any time, which take no gradient of the defender's loss."""
    judge = copy.deepcopy(attacker).requires_grad_(False)
    for weight, learned in zip(judge.parameters(), attacker.parameters(), strict=True):
        weight.data = learned.data
    return judge


def _deal(steps: int, number: int, parts: int) -> int:
    """How many of the attacker's `steps` fall to part `number` of a batch."""
    return steps * (number + 1) // parts - steps * number // parts


def _sgd(model: Classifier, task: Task, config: DauConfig) -> Optimizer:
    momentum, weight_decay = config.momentum, config.weight_decay
    return sgd(model.network, task.masks, lr=config.lr, momentum=momentum, weight_decay=weight_decay)
