"""What the attacker sees of a sample, and what each sensitivity costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import SENSITIVITIES, DauConfig
from dau_fast.engine.batches import Load
from dau_fast.engine.device import Stopwatch
from dau_fast.engine.evaluation import map_batches
from dau_fast.engine.modes import evaluating
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.sharding import placed
from dau_fast.errors import UserError
from dau_fast.models import Classifier, Outputs
from dau_fast.ops import input_grad_norms, per_sample_grad_norms, sensitivity

# Norms of the per-sample gradient with respect to the input and to all parameters; that with respect to the
# classifier layer comes from the pass that the game makes anyway.
_NORMS: dict[str, Callable[..., Tensor]] = {"input": input_grad_norms, "full": per_sample_grad_norms}

# Logarithms are taken of what lies above; nothing below tells one sample from another.
_LEAST_LOG_P = -20.0
_LEAST_ENTROPY = 1e-4
_LEAST_SENSITIVITY = 1e-3
# In place of a logit that is left out: finite, so that 0 times its logarithm is 0.
_LEFT_OUT = -1e4
# Of the limit at the logits, that at the features: those of images that stay move with them.
_FEATURES_SHARE = 0.5


@dataclass(frozen=True)
class View:
    """sensitivity: one of SENSITIVITIES, at the label seen; "input" and "full" from a pass of their own.

    features: whether the defender's are in u too. difficulty: whether u ends with a column of it.

    label_conditioned: u = [log p_y, margin of y, log entropy, one-hot of y]. Otherwise the label is left out
    and u = [log of the two largest of q, log entropy of q] with q the softmax over all other classes; the
    sensitivity is then that at the predicted label.
    """

    label_conditioned: bool = True
    sensitivity: str = "none"
    difficulty: bool = False
    features: bool = False

    @classmethod
    def of(cls, config: DauConfig, *, difficulty: bool = True) -> View:
        """As `config` has it. difficulty: whether there is one to be seen."""
        rated = config.difficulty and difficulty
        return cls(config.label_conditioned, config.sensitivity, rated, config.features)

    def count_columns(self, classes: int, features: int) -> int:
        """How many numbers the attacker sees of a sample, of a model of as many `classes` and `features`."""
        shown = 3 + classes if self.label_conditioned else 1 + min(2, classes - 1)
        return shown + self.features * features + (self.sensitivity != "none") + self.difficulty

    def reveal(
        self,
        defender: Classifier,
        images: Tensor,
        outputs: Outputs,
        labels: Tensor,
        difficulty: Tensor | None = None,
    ) -> Tensor:
        """u [B, U] of `images` [B, ...] with `labels` [B]; outputs: the defender's, of the same images.

        difficulty: [B], where the view has it. Differentiable in the defender's parameters where gradients
        are enabled.
        """
        columns = [(_show_label if self.label_conditioned else _show_others)(outputs.logits, labels)]
        if self.features:
            columns.append(outputs.features)
        if self.sensitivity != "none":
            s = self._measure(defender, images, outputs, labels)
            columns.append(torch.log(s + _LEAST_SENSITIVITY).unsqueeze(1))
        if self.difficulty:
            assert difficulty is not None
            columns.append(difficulty.unsqueeze(1))
        return torch.cat([column.to(columns[0]) for column in columns], 1) if columns[1:] else columns[0]

    def _measure(self, defender: Classifier, images: Tensor, outputs: Outputs, labels: Tensor) -> Tensor:
        """The sensitivity [B]."""
        seen = labels if self.label_conditioned else outputs.logits.argmax(1)
        if self.sensitivity == "classifier":
            return sensitivity(outputs.logits, outputs.features, seen)
        with evaluating(defender):
            norms = _NORMS[self.sensitivity]
            return norms(defender, images, seen, _loss, create_graph=torch.is_grad_enabled())

    def reveal_all(
        self,
        defender: Classifier,
        load: Load,
        index: Tensor,
        labels: Tensor,
        keep: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda u, logits, index: u,
        *,
        difficulty: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """u [N, U] of the images `index` [N] in evaluation mode; labels, difficulty: of all images.

        keep: what is made of u [B, U], logits [B, C] and index [B] of each batch, [B, ...], where all of u
        may not fit. ranks: the processes that share the work, each of which has all rows in the end.
        """

        def kept(images: Tensor, batch: Tensor) -> tuple[Tensor]:
            outputs, rated = defender(images), None if difficulty is None else difficulty[batch]
            u = self.reveal(defender, images, outputs, labels[batch], rated)
            return (keep(u, outputs.logits, batch),)

        return map_batches(defender, load, index, kept, ranks=ranks)[0]


def _show_label(logits: Tensor, labels: Tensor) -> Tensor:
    """[log p_y, log p_y - log(1 - p_y), log entropy, one-hot of y], [B, 3 + C]."""
    right, log_p = mark_label(logits, labels), logits.log_softmax(1)
    log_right, log_wrong = _share_out(log_p, right)
    columns = [log_right.clamp_min(_LEAST_LOG_P), log_right - log_wrong, _log_entropy(log_p)]
    return torch.cat([torch.stack(columns, 1), right.to(logits)], 1)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin, log p_y - log(1 - p_y), of `logits` [B, C]; [B]."""
    log_right, log_wrong = _share_out(logits.log_softmax(1), mark_label(logits, labels))
    return log_right - log_wrong


def _share_out(log_p: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B] of the class that bool `right` [B, C] marks, and of the others together."""
    return log_p.masked_fill(~right, 0).sum(1), log_p.masked_fill(right, _LEFT_OUT).logsumexp(1)


def _show_others(logits: Tensor, labels: Tensor) -> Tensor:
    """[log of the two largest, log entropy] of the softmax over all classes but the label, [B, 3]."""
    log_q = logits.masked_fill(mark_label(logits, labels), _LEFT_OUT).log_softmax(1)
    largest = log_q.topk(min(2, logits.shape[1] - 1), 1).values
    return torch.cat([largest, _log_entropy(log_q).unsqueeze(1)], 1)


def mark_label(logits: Tensor, labels: Tensor) -> Tensor:
    """bool [B, C], true at the label. Not by one_hot, which waits for the host to look at the labels."""
    return labels.unsqueeze(1) == torch.arange(logits.shape[1], device=labels.device)


def _log_entropy(log_p: Tensor) -> Tensor:
    """Of distributions [B, C], in nats; [B]."""
    entropy = -(log_p.exp() * log_p).sum(1)
    return torch.log(entropy.clamp_min(0) + _LEAST_ENTROPY)


def reveal_turn(
    forward: Callable[[Tensor], Outputs],
    defender: Classifier,
    view: View,
    images: Tensor,
    labels: Tensor,
    difficulty: Tensor,
    limit: float,
) -> tuple[tuple[Outputs, Outputs, Outputs], Tensor, Tensor]:
    """One pass over as many images of retain, forget and validation: outputs, and what the attacker sees.

    forward: how to call the defender. images [3B, ...], labels, difficulty [3B]; u [B, U] of forget with its
    graph, of validation without. limit: of the norm of a row's gradient through u at the logits, and half
    of it at features that are seen; 0 for none.
    """
    outputs = forward(images)
    retain, forget, validation = (
        Outputs(*part) for part in zip(*(tensor.chunk(3) for tensor in outputs), strict=True)
    )
    shown = list(zip(images.chunk(3), labels.chunk(3), difficulty.chunk(3), strict=True))
    seen = forget._replace(logits=_Limit.apply(forget.logits, limit)) if limit else forget
    if limit and view.features:
        seen = seen._replace(features=_Limit.apply(forget.features, _FEATURES_SHARE * limit))
    u_forget = view.reveal(defender, shown[1][0], seen, *shown[1][1:])
    with torch.no_grad():
        u_validation = view.reveal(defender, shown[2][0], validation, *shown[2][1:])
    return (retain, forget, validation), u_forget, u_validation


class _Limit(torch.autograd.Function):
    """Rows [B, C] as they are, whose gradients are scaled down to norm `limit` where they are longer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        return gradient * (ctx.limit / length.clamp_min(ctx.limit)), None


def _loss(outputs: Outputs, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, targets, reduction="none")


def check_sensitivity(name: str, model: Classifier, images: Tensor) -> None:
    """UserError where `model` has no such sensitivity, or none that can be differentiated: one pass tells."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    try:
        with evaluating(model):
            u = View(sensitivity=name).reveal(model, images, model(images), labels)
            torch.autograd.grad(u.sum(), _trained(model), allow_unused=True)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"this model has no sensitivity '{name}': {reason}") from error


def time_sensitivities(
    model: Classifier, images: Tensor, labels: Tensor, rounds: int = 3
) -> dict[str, float | None]:
    """Median seconds of a pass, forward and backward, with each sensitivity of its batch, "none" included.

    None where the model has no such one. `model` is on the images' device and in evaluation mode meanwhile.
    """
    found: dict[str, float | None] = {}
    with placed(images.device, model), evaluating(model):
        for name in SENSITIVITIES:
            try:
                # The first time pays for what is made lazily.
                taken = [_time_sensitivity(name, model, images, labels) for _ in range(rounds + 1)]
                found[name] = median(taken[1:])
            except (ValueError, RuntimeError):
                # A layer that per_sample_grad_norms does not know, or one without a second derivative.
                found[name] = None
    return found


def _time_sensitivity(name: str, model: Classifier, images: Tensor, labels: Tensor) -> float:
    with Stopwatch(images.device) as watch:
        shown = View(sensitivity=name).reveal(model, images, model(images), labels)
        torch.autograd.grad(shown.sum(), _trained(model), allow_unused=True)
    return watch.seconds


def _trained(model: Classifier) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
