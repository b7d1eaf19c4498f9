"""What a model that never saw the forget images would say of them, where they are spread over classes.

The original knows each of them by heart, but not its neighbours: moved by a pixel or two it is an image that
was never learned, and how sure the original is of that tells how sure it would be of the image, had it not
seen it. So does a plain model of the retain set. Neither number is what an unseen image gets; but retain
images have both too and were learned alike, and an image of some rank among them would, unseen, be of that
rank among validation images. What else an image is taken for both models say, as of classes that are gone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.data.split import draw_sample
from dau_fast.engine.evaluation import map_batches
from dau_fast.methods.dau.departure import (
    GONE,
    MOST,
    Departures,
    fit_temperature,
    join,
    mark_gone,
    score,
)
from dau_fast.methods.dau.difficulty import PlainModel, are_pictures, compute_features, margins_of, widen
from dau_fast.methods.dau.view import log_odds, mark_label
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

# Of a picture: one in each direction, moved by this share of its side.
NEIGHBOURS = 4
_STEP = 1 / 16
# How many times as much as the plain model a network loses with the forget set.
_GAIN = 2.0
# Of validation margins: parts of as many images, each of which is weighed as a whole.
_BINS = 10


@torch.no_grad()
def prepare_unseen(
    task: Task,
    plain: PlainModel | None,
    lesson: Tensor,
    shown: Tensor,
    *,
    share: float,
    wrong: float,
    most: int,
    chance: torch.Generator,
) -> Departures:
    """For a `task` whose forget set is spread over classes.

    plain: of the retain images `lesson` [L], None for none; share: of it in what else an image is taken for,
    0 to 1, where 0 leaves it out of everything. shown: labels [N] of all images, as the attacker sees them.
    wrong: share of the forget set whose labels are wrong. most: retain images that forget images are ranked
    among.
    """
    forget, validation, labels = task.split.forget, task.split.validation, task.labels
    rows = draw_sample(torch.arange(len(lesson), device=lesson.device), most, chance)
    with task.teacher() as original:
        answers, near = _ask_beside(original, task, forget)
        _, near_others = _ask_beside(original, task, lesson[rows])
        margins, seen = _ask(original, task, validation, labels, shown)
    signs, loss = [(near, near_others)], 0.0
    if plain is not None and share:
        said, of_validation = score(plain, task, forget), score(plain, task, validation)
        signs.append((margins_of(said, labels[forget]), _rate_learned(plain, task, lesson, rows)))
        none = mark_gone(task)
        warm = said / fit_temperature(of_validation, labels[validation], none)
        answers = join(answers, _leave_label_out(widen(warm), labels[forget]).to(answers), share, none)
        loss = _estimate_loss(task, plain, lesson, of_validation, chance)
    expected = margins.quantile(torch.special.ndtr(_rank_together(signs, wrong) - loss).to(margins))
    own = mark_label(answers, labels[forget])
    targets = torch.where(own, F.logsigmoid(expected)[:, None], F.logsigmoid(-expected)[:, None] + answers)
    places = torch.zeros_like(labels).index_put((forget,), torch.arange(len(forget), device=labels.device))
    counts = targets.new_ones(len(labels)).index_put((validation,), _weigh(seen, expected).to(targets))
    return Departures(targets, places, shown, counts)


def _ask(original: Classifier, task: Task, index: Tensor, *labels: Tensor) -> list[Tensor]:
    """Margins [n] of the images `index` [n] by each of `labels`, of all images."""

    def ask(images: Tensor, batch: Tensor) -> list[Tensor]:
        logits = widen(original(images).logits)
        return [log_odds(logits, version[batch]) for version in labels]

    return map_batches(original, task.images, index, ask, ranks=task.ranks)


def _ask_beside(original: Classifier, task: Task, index: Tensor) -> list[Tensor]:
    """What `original` says of the neighbours of the images `index` [n], on average.

    Log-probabilities of the classes beside the label, [n, C], and margins of the label, [n].
    """

    def ask(images: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        labels = task.labels[batch]
        said = [widen(original(moved).logits) for moved in move_about(images)]
        answers = torch.stack([logits.log_softmax(1) for logits in said]).mean(0)
        margins = torch.stack([log_odds(logits, labels) for logits in said]).mean(0)
        return _leave_label_out(answers, labels), margins

    return map_batches(original, task.images, index, ask, ranks=task.ranks)


def move_about(images: Tensor) -> list[Tensor]:
    """The neighbours of `images` [B, ...]: pictures moved up, down, left and right; of others, themselves."""
    if not (images.is_floating_point() and are_pictures(images.shape[1:])):
        return [images]
    steps = [max(1, round(_STEP * side)) for side in images.shape[2:]]
    return [images.roll(sign * step, axis) for axis, step in enumerate(steps, 2) for sign in (1, -1)]


def _rate_learned(plain: PlainModel, task: Task, lesson: Tensor, rows: Tensor) -> Tensor:
    """Difficulty [m] of the images at `rows` [m] of `lesson`, as if `plain` had not learned from them."""
    index = lesson[rows]
    labels = task.labels[index]
    return margins_of(plain.leave_out(score(plain, task, index), rows, labels), labels)


def _rank_together(signs: list[tuple[Tensor, Tensor]], wrong: float) -> Tensor:
    """Normal scores [F] of forget images among others, by the mean of their ranks by each of `signs`.

    Where signs err differently their mean varies less than each of them, and its ranks are further apart.
    That is right for images that are hard, but a wrong label is all there in either sign: of a share `wrong`
    of such labels the mean over the forget set is what the signs say, and not further out. signs: numbers of
    the forget images [F] and of the others [m].
    """
    heights = torch.stack([_rank(values, others) for values, others in signs]).mean(0)
    ranks = torch.stack([_rank(others, others) for _, others in signs])
    among = ranks.mean(0)
    found = _rank(heights, among)
    if not wrong:
        return found
    one, mean = ranks.square().mean().sqrt(), among.square().mean().sqrt()
    excess = torch.where(one > 0, 1 - mean / one, 0.0)
    return found - wrong * excess * found.mean()


def _rank(values: Tensor, among: Tensor) -> Tensor:
    """Normal scores [n] of the ranks of `values` [n] among the numbers `among` [m]: 0 in the middle."""
    ordered = among.sort().values
    below, to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return torch.special.ndtri(((below + to) / 2 + 0.5) / (len(among) + 1))


def _estimate_loss(
    task: Task, plain: PlainModel, lesson: Tensor, scores: Tensor, chance: torch.Generator
) -> float:
    """What a network loses of its validation margins without the forget set, in their standard deviations.

    As told by a plain model that learns from both sets. scores: of `plain`, which learned from `lesson`.
    """
    split, labels = task.split, task.labels[task.split.validation]
    # A sample of the retain set may be all that the game is played with.
    count = count_unseen(len(split.forget), len(lesson), len(split.train) - len(split.forget))
    more = draw_sample(split.forget, count, chance)
    seen = torch.cat([plain.seen, compute_features(plain.features, task.images, more)])
    informed = PlainModel(plain.features, seen, task.labels[torch.cat([lesson, more])], scores.shape[1])
    without, margins = margins_of(scores, labels), margins_of(score(informed, task, split.validation), labels)
    spread = margins.std(correction=0)
    return float(torch.where(spread > 0, _GAIN * (margins - without).mean() / spread, 0.0))


def count_unseen(forget: int, lesson: int, retain: int) -> int:
    """Images of a forget set of `forget` that are learned from beside `lesson` of `retain`: in proportion."""
    return min(forget, max(1, round(lesson * forget / retain)))


def _weigh(seen: Tensor, expected: Tensor) -> Tensor:
    """How much each validation image of margin `seen` [V] says, [V], as forget images are `expected` [F]."""
    seen, expected = seen.contiguous(), expected.contiguous()
    edges = seen.quantile(torch.linspace(0, 1, _BINS + 1).to(seen)[1:-1])
    place = torch.bucketize(seen, edges)
    held = place.bincount(minlength=_BINS) / len(seen)
    # One image more in every part: few forget images are little to go by.
    wanted = (torch.bucketize(expected, edges).bincount(minlength=_BINS) + 1) / (len(expected) + _BINS)
    return (wanted / held.clamp_min(torch.finfo(wanted.dtype).tiny)).clamp_max(MOST)[place]


def _leave_label_out(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities [B, C] of all classes but the label."""
    return logits.masked_fill(mark_label(logits, labels), GONE).log_softmax(1)
