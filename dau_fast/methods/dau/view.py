"""What the attacker sees of a sample: u = [softmax, sensitivity], and what each sensitivity costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.engine.batches import Load
from dau_fast.engine.device import Stopwatch
from dau_fast.engine.evaluation import map_batches
from dau_fast.engine.modes import evaluating
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.sharding import placed
from dau_fast.errors import UserError, check_choice
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

    def reveal(self, defender: Classifier, images: Tensor, outputs: Outputs, labels: Tensor) -> Tensor:
        """u [B, C + 1] of `images` [B, ...] with `labels` [B]; outputs: the defender's, of the same images.

        Differentiable in the defender's parameters where gradients are enabled.
        """
        if self.sensitivity == "classifier":
            known = labels if self.label_conditioned else None
            return attack_features(outputs.logits, outputs.features, known)
        given = labels if self.label_conditioned else outputs.logits.argmax(1)
        with evaluating(defender):
            s = _NORMS[self.sensitivity](defender, images, given, _loss, create_graph=torch.is_grad_enabled())
        return torch.cat([outputs.logits.softmax(1), s.unsqueeze(1).to(outputs.logits)], 1)

    def reveal_all(
        self,
        defender: Classifier,
        load: Load,
        index: Tensor,
        labels: Tensor,
        keep: Callable[[Tensor, Tensor], Tensor] = lambda u, labels: u,
        *,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """u [N, C + 1] of the images `index` [N] in evaluation mode; labels: of all images.

        keep: what is made of u [B, C + 1] and labels [B] of each batch, [B, ...], where all of u may not
        fit. ranks: the processes that share the work, each of which has all rows in the end.
        """

        def kept(images: Tensor, batch: Tensor) -> tuple[Tensor]:
            targets = labels[batch]
            return (keep(self.reveal(defender, images, defender(images), targets), targets),)

        return map_batches(defender, load, index, kept, ranks=ranks)[0]


def reveal_turn(
    forward: Callable[[Tensor], Outputs], defender: Classifier, view: View, images: Tensor, labels: Tensor
) -> tuple[tuple[Outputs, Outputs, Outputs], Tensor, Tensor]:
    """One pass over as many images of retain, forget and validation: outputs, and what the attacker sees.

    forward: how to call the defender. images [3B, ...], labels [3B]; u [B, C + 1] of forget with its
    graph, of validation without.
    """
    outputs = forward(images)
    retain, forget, validation = (
        Outputs(*part) for part in zip(*(tensor.chunk(3) for tensor in outputs), strict=True)
    )
    _, images_forget, images_validation = images.chunk(3)
    _, labels_forget, labels_validation = labels.chunk(3)
    u_forget = view.reveal(defender, images_forget, forget, labels_forget)
    with torch.no_grad():
        u_validation = view.reveal(defender, images_validation, validation, labels_validation)
    return (retain, forget, validation), u_forget, u_validation


def _loss(outputs: Outputs, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, targets, reduction="none")


def check_sensitivity(name: str, model: Classifier, images: Tensor) -> None:
    """UserError where `model` has no such sensitivity, or none that can be differentiated: one pass tells."""
    check_choice("sensitivity", name, SENSITIVITIES)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    try:
        with evaluating(model):
            u = View(name).reveal(model, images, model(images), labels)
            torch.autograd.grad(u.sum(), _trained(model), allow_unused=True)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"this model has no sensitivity '{name}': {reason}") from error


def time_sensitivities(
    model: Classifier, images: Tensor, labels: Tensor, rounds: int = 3
) -> dict[str, float | None]:
    """Median seconds of each sensitivity of one batch, forward and backward; None where there is none.

    What the pass over the images themselves costs, forward and backward, is "none" and is contained
    in the others. `model` is on their device and in evaluation mode meanwhile.
    """
    found: dict[str, float | None] = {}
    with placed(images.device, model), evaluating(model):
        for name in ("none", *SENSITIVITIES):
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
        outputs = model(images)
        shown = outputs.logits if name == "none" else View(name).reveal(model, images, outputs, labels)
        torch.autograd.grad(shown.sum(), _trained(model), allow_unused=True)
    return watch.seconds


def _trained(model: Classifier) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
