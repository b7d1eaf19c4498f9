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

from dau_fast.config import SENSITIVITIES, DauConfig
from dau_fast.engine.evaluation import map_batches
from dau_fast.errors import UserError
from dau_fast.methods.dau import game, view
from dau_fast.methods.dau.view import View, check_sensitivity, reveal_turn, time_sensitivities
from dau_fast.models import Classifier, Outputs
from dau_fast.ops import sensitivity


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


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_attacker_sees_margin_entropy_and_label_or_the_others(conditioned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 4, generator=generator).double(), torch.tensor([0, 1, 2, 3, 1])
    model = Classifier(nn.Sequential(nn.Linear(6, 4)))
    u = View(conditioned).reveal(model, torch.zeros(5, 6), Outputs(torch.zeros(5, 6), logits), labels)
    assert u.shape == (5, View(conditioned).count_columns(4, 6))
    for row, z, y in zip(u, logits, labels, strict=True):
        p = z.exp() / z.exp().sum()
        if conditioned:
            entropy = -(p * p.log()).sum()
            shown = [p[y].log(), (p[y] / (1 - p[y])).log(), (entropy + 1e-4).log()]
            expected = torch.cat([torch.stack(shown), torch.eye(4)[y].double()])
        else:
            q = torch.cat([p[:y], p[y + 1 :]]) / (1 - p[y])
            entropy = -(q * q.log()).sum()
            largest, second = q.sort(descending=True).values[:2]
            expected = torch.stack([largest.log(), second.log(), (entropy + 1e-4).log()])
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_outputs_of_any_certainty_are_finite_and_differentiable(conditioned: bool, classes: int) -> None:
    logits = torch.zeros(3, classes)
    logits[0, 0], logits[1, 1], logits[2, 0] = 300.0, 300.0, -300.0
    logits.requires_grad_(True)
    model = Classifier(nn.Sequential(nn.Linear(6, classes)))
    outputs = Outputs(torch.zeros(3, 6), logits)
    u = View(conditioned).reveal(model, torch.zeros(3, 6), outputs, torch.zeros(3, dtype=torch.int64))
    (grad,) = torch.autograd.grad(u.sum(), [logits])
    assert u.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("sensitivity", SENSITIVITIES[1:])
@pytest.mark.parametrize("conditioned", [True, False])
def test_every_sensitivity_is_a_per_sample_gradient_norm(
    model: Classifier, sensitivity: str, conditioned: bool
) -> None:
    model.eval()
    images, labels = some_images()
    outputs = model(images)
    u = View(conditioned, sensitivity).reveal(model, images, outputs, labels)
    at = labels if conditioned else outputs.logits.argmax(1)
    expected = [norm_by_backward(model, x, y, sensitivity) for x, y in zip(images, at, strict=True)]
    torch.testing.assert_close(u[:, -1], torch.log(torch.stack(expected) + 1e-3), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(u[:, :-1], View(conditioned).reveal(model, images, outputs, labels))


def test_the_classifiers_sensitivity_is_that_of_the_given_outputs(model: Classifier) -> None:
    images, labels = some_images()
    outputs = model(images)  # in training mode, normalised over this batch
    found = View(True, "classifier").reveal(model, images, outputs, labels)
    s = sensitivity(outputs.logits, outputs.features, labels)
    assert torch.equal(found[:, -1], torch.log(s + 1e-3))


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_modes_and_statistics_are_left_as_they_were(model: Classifier, sensitivity: str) -> None:
    images, labels = some_images()
    modes, before = [m.training for m in model.modules()], weights(model)
    assert len(set(modes)) == 2
    outputs = model.eval()(images)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    View(sensitivity=sensitivity).reveal(model, images, outputs, labels)
    View(sensitivity=sensitivity).reveal_all(model, lambda index: images[index], torch.arange(7), labels)
    check_sensitivity(sensitivity, model, images)
    assert [m.training for m in model.modules()] == modes
    assert same(before, weights(model))


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_it_is_differentiable_where_gradients_are_enabled(model: Classifier, sensitivity: str) -> None:
    model.eval()
    images, labels = some_images()
    seen, weight = View(sensitivity=sensitivity), model.network[0].weight

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
    seen = View(sensitivity=sensitivity)
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

    def margin_and_label(u: Tensor, logits: Tensor, batch: Tensor) -> Tensor:
        widths.append((u.shape, logits.shape))
        return torch.stack([u[:, 1], labels[batch].to(u)], 1)

    monkeypatch.setattr(view, "map_batches", partial(map_batches, batch_size=2))
    found = seen.reveal_all(model, lambda i: images[i], index, labels, margin_and_label)
    torch.testing.assert_close(found, torch.stack([whole[:, 1], labels[index].float()], 1))
    assert widths == [((rows, 6), (rows, 3)) for rows in (2, 2, 1)]


@pytest.mark.parametrize("sensitivity", ["input", "full"])
def test_the_game_is_played_with_each(sensitivity: str) -> None:
    config = DauConfig(label_conditioned=True, alpha=4.0, turns=16, batch_size=32, sensitivity=sensitivity)
    task = trained(TENTH)
    found = game.unlearn(task, config)
    assert percent_right(task, found.model, task.split.retain) >= 90
    usual = game.unlearn(task, replace(config, sensitivity="classifier")).model
    assert not same(weights(found.model), weights(usual))


class Bypassed(nn.Module):
    """A layer's weight is used without a call of the layer, so that its per-sample gradient is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight


class Scaled(nn.Module):
    """A layer without a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_a_model_without_such_a_sensitivity_is_refused() -> None:
    model = Classifier(nn.Sequential(Bypassed(), nn.Linear(6, 3)))
    images, labels = some_images()
    for name in ("classifier", "input"):
        check_sensitivity(name, model, images)
    check_sensitivity("full", Classifier(nn.Sequential(Scaled(), nn.Linear(6, 3))), images)
    with pytest.raises(UserError, match=r"no sensitivity 'full': .*inner.weight is used outside its layer"):
        check_sensitivity("full", model, images)
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
        if name == "none":
            continue
        u = View(sensitivity=name).reveal(model, images, model(images), torch.zeros_like(labels))
        assert (u[:, -1] == torch.tensor(1e-3).log()).all()
        grads = torch.autograd.grad(u.sum(), list(model.parameters()), allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)


def test_difficulty_is_a_column_of_its_own(model: Classifier) -> None:
    images, labels = some_images(5)
    difficulty, index = torch.tensor([0.1, -0.2, 0.3, 0.0, 0.5]), torch.tensor([4, 1])
    plain, rated = View(), View(difficulty=True)
    assert rated.count_columns(3, 8) == plain.count_columns(3, 8) + 1
    found = rated.reveal_all(model, lambda i: images[i], index, labels, difficulty=difficulty)
    expected = plain.reveal_all(model, lambda i: images[i], index, labels)
    torch.testing.assert_close(found, torch.cat([expected, difficulty[index, None]], 1))


def test_features_are_columns_of_their_own(model: Classifier) -> None:
    images, labels = some_images(5)
    outputs = model(images)
    plain, wider = View(False), View(False, features=True)
    width = outputs.features.shape[1]
    assert wider.count_columns(3, width) == plain.count_columns(3, width) + width
    found = wider.reveal(model, images, outputs, labels)
    expected = [plain.reveal(model, images, outputs, labels), outputs.features]
    torch.testing.assert_close(found, torch.cat(expected, 1))


def test_at_features_that_are_seen_a_forget_image_pulls_half_as_hard_at_most() -> None:
    features = torch.randn(9, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    outputs, model = Outputs(features, torch.zeros(9, 3)), perceptron(0)
    shown = torch.zeros(9, 6), torch.arange(9) % 3, torch.zeros(9)
    _, u, _ = reveal_turn(lambda _: outputs, model, View(False, features=True), *shown, 0.3)
    (u[:, -2:].square().sum(1) * torch.tensor([1e-4, 1.0, 50.0])).sum().backward()
    lengths = 2 * features[3:6].detach().norm(dim=1) * torch.tensor([1e-4, 1.0, 50.0])
    assert features.grad is not None
    torch.testing.assert_close(features.grad[3:6].norm(dim=1), lengths.clamp(max=0.15))


def turn_of(limit: float) -> tuple[Tensor, Tensor]:
    """u of the forget set, and the gradient of a steep function of it at the logits."""
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels, model = torch.arange(9) % 3, perceptron(0)
    outputs = Outputs(torch.zeros(9, 2), logits)
    _, u, _ = reveal_turn(lambda _: outputs, model, View(), torch.zeros(9, 6), labels, torch.zeros(9), limit)
    (gradient,) = torch.autograd.grad(
        (u[:, :3].square().sum(1) * torch.tensor([1e-4, 1.0, 50.0])).sum(), logits
    )
    return u.detach(), gradient[3:6]


def test_no_forget_image_pulls_harder_than_the_limit_and_none_in_another_direction() -> None:
    (free_u, free), (held_u, held) = turn_of(0.0), turn_of(0.3)
    assert torch.equal(free_u, held_u)
    lengths = free.norm(dim=1)
    assert lengths[0] < 0.3 < min(lengths[1:])
    torch.testing.assert_close(held.norm(dim=1), lengths.clamp(max=0.3))
    torch.testing.assert_close(held, free * (held.norm(dim=1) / lengths).unsqueeze(1))
