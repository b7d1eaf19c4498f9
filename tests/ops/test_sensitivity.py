"""Sensitivity against the gradients that autograd finds, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from dau_fast.ops import attack_features, sensitivity


def random_sample(
    rows: int = 9, d: int = 6, c: int = 5, bias: bool = True
) -> tuple[nn.Linear, Tensor, Tensor]:
    """A float64 layer [C, D], features [B, D] and labels [B]."""
    torch.manual_seed(rows + 10 * d + 100 * c)
    layer = nn.Linear(d, c, bias=bias, dtype=torch.float64)
    return layer, 2 * torch.randn(rows, d, dtype=torch.float64), torch.randint(c, (rows,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "d", "c"), [(9, 6, 5), (1, 1, 2), (3, 40, 100), (7, 2, 1)])
def test_sensitivity_is_the_gradient_norm_of_a_real_layer_by_backward(
    rows: int, d: int, c: int, bias: bool
) -> None:
    layer, features, targets = random_sample(rows, d, c, bias)
    norms = []
    for h, y in zip(features, targets, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(layer(h), y), list(layer.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    found = sensitivity(layer(features), features, targets, bias=bias)
    torch.testing.assert_close(found, torch.stack(norms), rtol=1e-9, atol=1e-12)


def test_sensitivity_is_the_gradient_norm_by_torch_func() -> None:
    layer, features, targets = random_sample(30)

    def loss(parameters: dict[str, Tensor], h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(layer, parameters, (h,)), y)

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, features, targets)
    norms = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()
    torch.testing.assert_close(sensitivity(layer(features), features, targets), norms, rtol=1e-9, atol=0)


def test_sensitivity_of_a_sample_computed_by_hand() -> None:
    logits = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    features = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    pull = (0.2**2 + 0.7**2 + 0.5**2) ** 0.5
    for bias, scale in ((True, 3.0), (False, 8**0.5)):
        found = sensitivity(logits, features, torch.tensor([1]), bias=bias).item()
        assert found == pytest.approx(scale * pull, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_finite_differences(bias: bool) -> None:
    layer, features, targets = random_sample(4, 3, 5)
    logits = layer(features).detach().requires_grad_()
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, h: sensitivity(z, h, targets, bias=bias), (logits, features))


def test_gradients_are_the_closed_form() -> None:
    layer, features, targets = random_sample(6)
    logits = layer(features).detach().requires_grad_()
    features.requires_grad_()
    sensitivity(logits, features, targets).sum().backward()
    p = logits.detach().softmax(1)
    e = p - F.one_hot(targets, 5)
    pull, scale = e.norm(dim=1, keepdim=True), (features.detach().square().sum(1, keepdim=True) + 1).sqrt()
    torch.testing.assert_close(logits.grad, scale / pull * p * (e - (p * e).sum(1, keepdim=True)))
    torch.testing.assert_close(features.grad, pull / scale * features.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_answer_is_exact_sensitivity_is_0_and_its_gradient_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2000.0, 0.0, -5.0], [0.0, 3e4, 0.0]], dtype=dtype, requires_grad=True)
    features = torch.randn(2, 4, dtype=dtype, requires_grad=True)
    found = sensitivity(logits, features, torch.tensor([0, 1]))
    assert (found == 0).all()
    found.sum().backward()
    assert (logits.grad == 0).all()
    assert (features.grad == 0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_features_of_0_have_a_finite_gradient(bias: bool) -> None:
    logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
    features = torch.zeros(1, 3, requires_grad=True)
    found = sensitivity(logits, features, torch.tensor([0]), bias=bias)
    found.sum().backward()
    assert (found > 0).item() == bias
    assert logits.grad.isfinite().all()
    assert (features.grad == 0).all()


def exactly(logits: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    """The definition in float64, with 1 - p_y as the sum of the other probabilities."""
    p = logits.double().softmax(1)
    others = p.scatter(1, targets.unsqueeze(1), 0)
    pull = (others.square().sum(1) + others.sum(1).square()).sqrt()
    return pull * (features.double().square().sum(1) + 1).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("margin", [5.0, 17.0, 40.0])
def test_very_confident_answers_keep_their_relative_precision(
    margin: float, classes: int, dtype: torch.dtype
) -> None:
    logits = torch.linspace(-1, 0, classes, dtype=dtype).unsqueeze(0).repeat(2, 1)
    logits[:, 0] = margin
    features, targets = torch.full((2, 3), 0.7, dtype=dtype), torch.tensor([0, 1])
    found = sensitivity(logits, features, targets)
    precision = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), exactly(logits, features, targets), rtol=precision, atol=0)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_constant_added_to_all_logits_changes_nothing(shift: float) -> None:
    layer, features, targets = random_sample()
    logits = layer(features)
    shifted = sensitivity(logits + shift, features, targets)
    torch.testing.assert_close(shifted, sensitivity(logits, features, targets), rtol=1e-8, atol=0)


# ---- what the attacker sees


def test_attack_features_are_softmax_and_sensitivity() -> None:
    layer, features, targets = random_sample()
    logits = layer(features)
    u = attack_features(logits, features, targets)
    assert u.shape == (9, 6)
    torch.testing.assert_close(u[:, :-1], logits.softmax(1))
    torch.testing.assert_close(u[:, -1], sensitivity(logits, features, targets))


def test_without_labels_sensitivity_is_that_at_the_predicted_label() -> None:
    layer, features, targets = random_sample(30)
    logits = layer(features)
    predicted = logits.argmax(1)
    assert (predicted != targets).any()
    u = attack_features(logits, features, None)
    assert torch.equal(u, attack_features(logits, features, predicted))
    assert not torch.equal(u, attack_features(logits, features, targets))


def test_attack_features_carry_gradients_to_logits_and_features() -> None:
    layer, features, _ = random_sample(4, 3, 4)
    logits = layer(features).detach().requires_grad_()
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, h: attack_features(z, h, None), (logits, features))
