"""What the attacker sees of a sample: u = [softmax, sensitivity], and what each sensitivity costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.engine.batches import Load, load_each
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.runtime import Stopwatch
from dau_fast.errors import UserError
from dau_fast.models import Classifier, Outputs
from dau_fast.ops import attack_features, input_grad_norms, per_sample_grad_norms

# Norms of the per-sample gradient with respect to the classifier layer, the input, all parameters.
# The first one comes from the pass that the game makes anyway.
SENSITIVITIES = ("classifier", "input", "full")
_NORMS: dict[str, Callable[..., Tensor]] = {"input": input_grad_norms, "full": per_sample_grad_norms}


@dataclass(frozen=True)
class View:
    """sensitivity: one of SENSITIVITIES, all but "classifier" from a pass of their own in evaluation mode.

    label_conditioned: sensitivity at the true label; otherwise at the predicted one.
    """

    sensitivity: str = "classifier"
    label_conditioned: bool = True

    def of(self, defender: Classifier, images: Tensor, outputs: Outputs, labels: Tensor) -> Tensor:
        """u [B, C + 1] of `images` [B, ...] with `labels` [B]; outputs: the defender's, of the same images.

        Differentiable in the defender's parameters where gradients are enabled.
        """
        if self.sensitivity == "classifier":
            known = labels if self.label_conditioned else None
            return attack_features(outputs.logits, outputs.features, known)
        given = labels if self.label_conditioned else outputs.logits.argmax(1)
        with _evaluating(defender):
            s = _NORMS[self.sensitivity](defender, images, given, _loss, create_graph=torch.is_grad_enabled())
        return torch.cat([outputs.logits.softmax(1), s.unsqueeze(1).to(outputs.logits)], 1)

    @torch.no_grad()
    def over(
        self,
        defender: Classifier,
        load: Load,
        index: Tensor,
        labels: Tensor,
        keep: Callable[[Tensor, Tensor], Tensor] = lambda u, labels: u,
        *,
        batch_size: int = 512,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """u [N, C + 1] of the images `index` [N] in evaluation mode; labels: of all images.

        keep: what is made of u [B, C + 1] and labels [B] of each batch, [B, ...], where all of u may not
        fit. ranks: the processes that share the work, each of which has all rows in the end.
        """
        parts = []
        with _evaluating(defender):
            batches = ranks.batches(index, batch_size)
            for batch, images in zip(batches, load_each(load, batches), strict=True):
                u = self.of(defender, images, defender(images), labels[batch])
                parts.append(keep(u, labels[batch]))
        return ranks.gather(torch.cat(parts), ranks.rows(len(index)))


def _loss(outputs: Outputs, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, targets, reduction="none")


@contextmanager
def _evaluating(model: Classifier) -> Iterator[None]:
    """Every module in evaluation mode, and back to the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_sensitivity(name: str, model: Classifier, images: Tensor) -> None:
    """UserError where `model` has no such sensitivity, or none that can be differentiated: one pass tells."""
    if name not in SENSITIVITIES:
        raise UserError(f"unknown sensitivity '{name}': expected one of {', '.join(SENSITIVITIES)}")
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    try:
        with _evaluating(model):
            u = View(name).of(model, images, model(images), labels)
            torch.autograd.grad(u.sum(), _trained(model), allow_unused=True)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"this model has no sensitivity '{name}': {reason}") from error


def costs(model: Classifier, images: Tensor, labels: Tensor, rounds: int = 3) -> dict[str, float | None]:
    """Median seconds of each sensitivity of one batch, forward and backward; None where there is none.

    What the pass over the images themselves costs, forward and backward, is "none" and is contained
    in the others.
    """
    found: dict[str, float | None] = {}
    for name in ("none", *SENSITIVITIES):
        try:
            taken = []
            for _ in range(rounds + 1):
                with Stopwatch(images.device) as watch:
                    outputs = model(images)
                    u = outputs.logits if name == "none" else View(name).of(model, images, outputs, labels)
                    torch.autograd.grad(u.sum(), _trained(model), allow_unused=True)
                taken.append(watch.seconds)
            found[name] = median(taken[1:])
        except (ValueError, RuntimeError):
            # A layer that per_sample_grad_norms does not know, or one without a second derivative.
            found[name] = None
    return found


def _trained(model: Classifier) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
