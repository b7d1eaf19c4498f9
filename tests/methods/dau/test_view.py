"""What the attacker sees: each sensitivity against its meaning, and the game played with each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_game import percent_right, same, weights
from torch import Tensor, nn
from torch.nn import functional as F
from toys import TENTH, perceptron, trained

from dau_fast.config import DauConfig
from dau_fast.engine.evaluation import map_batches
from dau_fast.errors import UserError
from dau_fast.methods.dau import game, view
from dau_fast.methods.dau.view import SENSITIVITIES, View, check_sensitivity, time_sensitivities
from dau_fast.models import Classifier
from dau_fast.ops import attack_features


@pytest.fixture
def model() -> Classifier:
    """In training mode, but for one layer, and with running statistics that matter."""
    made = perceptron(0)
    with torch.no_grad():
        for _ in range(20):
            made(torch.randn(50, 6) * 2 + 1)
    made.network[1].weight.requires_grad_(True)
    made.network[2].eval()
    return made


def some_images(rows: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 6, generator=generator), torch.arange(rows) % 3


def norm_by_backward(model: Classifier, image: Tensor, label: Tensor, sensitivity: str) -> Tensor:
    """One image's gradient norm, in evaluation mode."""
    x = image.unsqueeze(0).clone().requires_grad_()
    outputs = model(x)
    loss = F.cross_entropy(outputs.logits, label.unsqueeze(0))
    wanted = {
        "classifier": list(model.head.parameters()), "input": [x], "full": list(model.parameters()),
    }[sensitivity]  # fmt: skip
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]).norm()


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("conditioned", [True, False])
def test_every_sensitivity_is_a_per_sample_gradient_norm(
    model: Classifier, sensitivity: str, conditioned: bool
) -> None:
    model.eval()
    images, labels = some_images()
    outputs = model(images)
    u = View(sensitivity, conditioned).reveal(model, images, outputs, labels)
    at = labels if conditioned else outputs.logits.argmax(1)
    expected = [norm_by_backward(model, x, y, sensitivity) for x, y in zip(images, at, strict=True)]
    torch.testing.assert_close(u[:, -1], torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(u[:, :-1], outputs.logits.softmax(1))


def test_the_classifiers_sensitivity_is_that_of_the_given_outputs(model: Classifier) -> None:
    images, labels = some_images()
    outputs = model(images)  # in training mode, normalised over this batch
    found = View("classifier", True).reveal(model, images, outputs, labels)
    assert torch.equal(found, attack_features(outputs.logits, outputs.features, labels))


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_modes_and_statistics_are_left_as_they_were(model: Classifier, sensitivity: str) -> None:
    images, labels = some_images()
    modes, before = [m.training for m in model.modules()], weights(model)
    assert len(set(modes)) == 2
    outputs = model.eval()(images)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    View(sensitivity).reveal(model, images, outputs, labels)
    View(sensitivity).reveal_all(model, lambda index: images[index], torch.arange(7), labels)
    check_sensitivity(sensitivity, model, images)
    assert [m.training for m in model.modules()] == modes
    assert same(before, weights(model))


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_it_is_differentiable_where_gradients_are_enabled(model: Classifier, sensitivity: str) -> None:
    model.eval()
    images, labels = some_images()
    seen, weight = View(sensitivity), model.network[0].weight

    def total() -> Tensor:
        return seen.reveal(model, images, model(images), labels)[:, -1].sum()

    (found,) = torch.autograd.grad(total(), [weight])
    with torch.no_grad():
        assert not total().requires_grad
        step = 3e-3  # outputs are float32
        for place in ((0, 0), (9, 4)):
            kept = weight[place].item()
            weight[place] = kept + step
            above = total()
            weight[place] = kept - step
            below = total()
            weight[place] = kept
            slope = ((above - below) / (2 * step)).item()
            assert found[place].item() == pytest.approx(slope, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_over_a_set_it_is_the_same_in_batches(
    model: Classifier, sensitivity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = some_images(11)
    index = torch.tensor([3, 0, 10, 5, 7])
    seen = View(sensitivity)
    whole = seen.reveal_all(model, lambda i: images[i], index, labels)
    monkeypatch.setattr(view, "map_batches", partial(map_batches, batch_size=2))
    parts = seen.reveal_all(model, lambda i: images[i], index, labels)
    torch.testing.assert_close(whole, parts)
    assert not whole.requires_grad


def test_of_a_set_only_what_is_asked_for_is_kept(model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = some_images(11)
    index = torch.tensor([3, 0, 10, 5, 7])
    seen, widths = View(), []
    whole = seen.reveal_all(model, lambda i: images[i], index, labels)

    def largest_and_label(u: Tensor, labels: Tensor) -> Tensor:
        widths.append(u.shape)
        return torch.stack([u[:, :-1].amax(1), labels.to(u)], 1)

    monkeypatch.setattr(view, "map_batches", partial(map_batches, batch_size=2))
    found = seen.reveal_all(model, lambda i: images[i], index, labels, largest_and_label)
    torch.testing.assert_close(found, torch.stack([whole[:, :-1].amax(1), labels[index].float()], 1))
    assert widths == [(2, 4), (2, 4), (1, 4)]


@pytest.mark.parametrize("sensitivity", ["input", "full"])
def test_the_game_is_played_with_each(sensitivity: str) -> None:
    config = DauConfig(
        label_conditioned=True, alpha=0.5, game_epochs=1, batch_size=32, recovery_epochs=1,
        sensitivity=sensitivity,
    )  # fmt: skip
    task = trained(TENTH)
    found = game.unlearn(task, config)
    assert percent_right(task, found.model, task.split.retain) >= 90
    usual = game.unlearn(task, replace(config, sensitivity="classifier")).model
    assert not same(weights(found.model), weights(usual))


class Scaled(nn.Module):
    """A layer whose per-sample gradient is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_a_model_without_such_a_sensitivity_is_refused() -> None:
    model = Classifier(nn.Sequential(Scaled(), nn.Linear(6, 3)))
    images, labels = some_images()
    for name in ("classifier", "input"):
        check_sensitivity(name, model, images)
    with pytest.raises(
        UserError, match=r"no sensitivity 'full': no per-sample gradient is known for .*Scaled"
    ):
        check_sensitivity("full", model, images)
    with pytest.raises(UserError, match="`sensitivity=labels`: expected one of classifier, input, full"):
        check_sensitivity("labels", model, images)
    found = time_sensitivities(model, images, labels)
    assert found["full"] is None
    assert all(found[name] > 0 for name in ("none", "classifier", "input"))


class Once(torch.autograd.Function):
    """Twice its input, differentiable `times` times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        ctx.times = times
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.times == 0:
            raise RuntimeError("there is no second derivative")
        return Once.apply(grad, ctx.times - 1), None


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x, 1)


def test_a_layer_without_a_second_derivative_is_refused_before_the_game() -> None:
    model = Classifier(nn.Sequential(nn.Linear(6, 6), Doubled(), nn.Linear(6, 3)))
    images, labels = some_images()
    check_sensitivity("classifier", model, images)
    for name in ("input", "full"):
        with pytest.raises(UserError, match=f"no sensitivity '{name}': there is no second derivative"):
            check_sensitivity(name, model, images)
    found = time_sensitivities(model, images, labels)
    assert found["classifier"] is not None
    assert found["input"] is found["full"] is None


def test_a_gradient_of_exactly_0_has_a_finite_derivative(model: Classifier) -> None:
    model.eval()
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([500.0, 0.0, 0.0]))
    images, labels = some_images(3)
    for name in SENSITIVITIES:
        u = View(name).reveal(model, images, model(images), torch.zeros_like(labels))
        assert (u[:, -1] == 0).all()
        grads = torch.autograd.grad(u.sum(), list(model.parameters()), allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)
