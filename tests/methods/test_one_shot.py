"""Fisher, influence, SSD, MU-Mis and the head-only control: what each computes, by hand, and what it sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_tasks import linear_task, weight_of
from torch import Tensor, nn
from torch.nn import functional as F
from toys import ONE_CLASS, TENTH, trained

from dau_fast.data.images import Choice, Images
from dau_fast.engine.evaluation import predict
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.methods import fisher, head_only, influence, mu_mis, ssd
from dau_fast.methods.fisher import FisherConfig
from dau_fast.methods.head_only import HeadOnlyConfig, draw_stand_ins, without_classes
from dau_fast.methods.influence import InfluenceConfig
from dau_fast.methods.mu_mis import MuMisConfig
from dau_fast.methods.registry import get_method
from dau_fast.methods.ssd import SsdConfig
from dau_fast.methods.task import Task
from dau_fast.metrics.accuracy import accuracy
from dau_fast.models import Classifier
from dau_fast.prune import Masks

NAMES = ("fisher", "influence", "ssd", "mu_mis", "head_only")
every_name = pytest.mark.parametrize("name", NAMES)
# Settings by which each changes the toy model.
ASKED: dict[str, dict[str, Any]] = {
    "fisher": {"alpha": 1e-6, "largest": 0.1},
    "ssd": {"alpha": 1.0},
    "influence": {"samples": 100},
    "head_only": {"epochs": 200},
}


@pytest.fixture(scope="module")
def spread() -> Task:
    return trained(TENTH)


@pytest.fixture(scope="module")
def classwise() -> Task:
    return trained(ONE_CLASS)


def run(name: str, task: Task) -> Classifier:
    method = get_method(name)
    settings = method.resolve(task, ASKED.get(name))
    method.check(task, settings)
    return method.run(task, settings).model


def same(one: Classifier, other: Classifier) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def right(task: Task, model: Classifier, index: Tensor) -> float:
    return accuracy(predict(model, task.images, index).logits, task.labels[index])


# ---- what all of them keep to


@every_name
def test_the_original_and_the_global_random_state_stay_as_they_were(name: str, spread: Task) -> None:
    before = {key: tensor.clone() for key, tensor in spread.original.state_dict().items()}
    state = torch.get_rng_state()
    found = run(name, spread)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], tensor) for key, tensor in spread.original.state_dict().items())
    assert not same(found, spread.original)


@every_name
def test_the_seed_decides_whatever_ran_before(name: str, spread: Task) -> None:
    torch.manual_seed(1)
    first = run(name, spread)
    torch.manual_seed(2)
    assert same(run(name, spread), first)
    other = run(name, replace(spread, seed=1))
    assert same(other, first) == (name == "ssd"), "which draws nothing"


SEEN = {
    "fisher": ("retain",),
    "influence": ("forget", "retain"),
    "ssd": ("forget", "retain"),
    "mu_mis": ("forget",),
    "head_only": ("forget", "retain", "validation"),
}


@every_name
def test_each_sees_its_sets_and_nothing_else(
    name: str, spread: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    choose, gather = Images.choose, Images.gather

    def spy_choose(self: Images, index: Tensor, *drawn: Any) -> Choice:
        seen.update(index.tolist())
        return choose(self, index, *drawn)

    def spy_gather(self: Images, index: Tensor, *drawn: Any) -> Tensor:
        seen.update(index.tolist())
        return gather(self, index, *drawn)

    monkeypatch.setattr(Images, "choose", spy_choose)
    monkeypatch.setattr(Images, "gather", spy_gather)
    method = get_method(name)
    method.run(spread, method.resolve(spread, ASKED.get(name)))
    allowed = {i for part in SEEN[name] for i in getattr(spread.split, part).tolist()}
    assert seen <= allowed
    for part in SEEN[name]:
        assert seen & set(getattr(spread.split, part).tolist())
    if name not in ("influence", "head_only"):
        assert seen == allowed


@every_name
def test_the_published_settings_are_among_those_that_tuning_tries(name: str, spread: Task) -> None:
    method = get_method(name)
    usual = method.resolve(spread)
    for field, values in method.space.items():
        assert getattr(usual, field) in values
        assert len(set(values)) == len(values)
        for value in values:
            replace(usual, **{field: value})


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        (FisherConfig, {"alpha": 0}), (FisherConfig, {"largest": -1}), (InfluenceConfig, {"alpha": -1}),
        (InfluenceConfig, {"samples": 0}), (InfluenceConfig, {"damping": 0}), (SsdConfig, {"alpha": -1}),
        (SsdConfig, {"lambd": "x"}), (MuMisConfig, {"lr": 0}), (MuMisConfig, {"momentum": 1}),
        (MuMisConfig, {"batch_size": 0.5}), (HeadOnlyConfig, {"epochs": 0}), (HeadOnlyConfig, {"weight": -1}),
        (HeadOnlyConfig, {"retain_images": 0}),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: Any, wrong: dict[str, Any]) -> None:
    ((field, value),) = wrong.items()
    with pytest.raises(UserError, match=f"^`{field}={value}`: expected a"):
        settings(**wrong)


# ---- Fisher


def test_fisher_noise_has_the_variance_alpha_over_the_information() -> None:
    """Two classes, one weight each, W = 0: p = 1/2, so each gradient is half the pixel, up or down."""
    task = linear_task(torch.zeros(2, 1), torch.tensor([[9.0], [2.0], [4.0]]), [0, 0, 1], forget=[0])
    found = weight_of(fisher.unlearn(task, FisherConfig(alpha=0.1, largest=1)).model)
    drawn = torch.randn(2, generator=task.generator("fisher"), dtype=torch.float64)
    information = (1.0**2 + 2.0**2) / 2  # of retain alone: pixels 2 and 4
    torch.testing.assert_close(found.flatten(), drawn * (0.1 / information) ** 0.5)


def test_fisher_noise_is_bounded_where_there_is_no_information() -> None:
    information = torch.tensor([0.0, 1e-12, 4.0], dtype=torch.float64)
    found = fisher.noise_deviation(information, FisherConfig(alpha=1e-2, largest=0.3))
    torch.testing.assert_close(found, torch.tensor([0.3, 0.3, 0.05], dtype=torch.float64))


# ---- influence


def logistic(forget: list[int]) -> Task:
    """Two classes whose pixels have the same sum: W = 0 is where training on all of them ends.

    There p = 1/2 for every image, so that (p - e_y)(p - e_y)^T = diag(p) - p p^T: the empirical Fisher matrix
    is the Hessian.
    """
    pixels = torch.tensor([[1.0, 2.0], [3.0, -1.0], [2.0, 0.5], [2.0, 0.5], [1.0, 4.0], [1.0, 4.0]])
    return linear_task(torch.zeros(2, 2), pixels, [0, 0, 1, 1, 0, 1], forget)


def retain_loss(task: Task, weight: Tensor) -> Tensor:
    index = task.split.retain
    return F.cross_entropy(task.images.pixels[index] @ weight.T, task.labels[index])


def newton_step(task: Task, kept: Tensor, damping: float) -> Tensor:
    """Of the retain loss at W = 0, damped, for the weights `kept` alone; the same shape."""
    zero = torch.zeros(2, 2, dtype=torch.float64)
    grad = torch.autograd.functional.jacobian(lambda w: retain_loss(task, w), zero).flatten()
    hessian = torch.autograd.functional.hessian(lambda w: retain_loss(task, w), zero).reshape(4, 4)
    keep = kept.flatten().nonzero().squeeze(1)
    inner = hessian[keep][:, keep] + damping * torch.eye(len(keep), dtype=torch.float64)
    step = torch.zeros(4, dtype=torch.float64)
    step[keep] = -torch.linalg.solve(inner, grad[keep])
    return step.view(2, 2)


@pytest.mark.parametrize("kept", [[[1, 1], [1, 1]], [[1, 0], [0, 1]]], ids=["dense", "pruned"])
def test_influence_is_a_newton_step_where_the_fisher_matrix_is_the_hessian(kept: list[list[int]]) -> None:
    task, mask = logistic(forget=[1, 4]), torch.tensor(kept).bool()
    if not mask.all():
        task = replace(task, masks=Masks({"weight": mask}))
    step = newton_step(task, mask, damping=0.01)
    for alpha in (1.0, 3.0):
        found = influence.unlearn(task, InfluenceConfig(alpha=alpha, damping=0.01)).model
        torch.testing.assert_close(weight_of(found), alpha * step, rtol=1e-4, atol=1e-8)
    assert retain_loss(task, step) < retain_loss(task, torch.zeros_like(step))


def test_influence_takes_a_sample_of_the_retain_set_for_its_hessian(
    spread: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    gradients = influence.SampleGradients

    def spy(model: Classifier, task: Task, index: Tensor) -> Any:
        sizes.append(len(index))
        return gradients(model, task, index)

    monkeypatch.setattr(influence, "SampleGradients", spy)
    influence.unlearn(spread, InfluenceConfig(samples=7))
    assert sizes == [len(spread.split.forget), len(spread.split.retain), 7]


def test_conjugate_gradients_solve_and_say_when_they_do_not(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, dtype=torch.float64, generator=generator)
    matrix, v = root @ root.T + torch.eye(30), torch.randn(30, dtype=torch.float64, generator=generator)
    found = influence.solve(lambda x: matrix @ x, v)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, v), rtol=1e-3, atol=1e-5)
    assert torch.equal(influence.solve(lambda x: matrix @ x, 0 * v), 0 * v)
    assert not caplog.messages
    scales = torch.logspace(0, 12, 300)
    influence.solve(lambda x: scales * x, torch.ones(300))
    assert "no convergence in 200 products with its Hessian" in caplog.text


# ---- SSD


def test_ssd_dampens_by_the_ratio_of_importances_where_it_is_above_alpha() -> None:
    forget, train = (torch.tensor(x, dtype=torch.float64) for x in ([12.0, 9.0, 0.0], [1.0, 1.0, 0.0]))
    for lambd, expected in ((1.0, [1 / 12, 1, 1]), (6.0, [0.5, 1, 1]), (24.0, [1, 1, 1])):
        found = ssd.dampening(forget, train, SsdConfig(alpha=10, lambd=lambd))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_ssd_shrinks_the_weight_that_only_the_forget_set_uses() -> None:
    """One forget image of four lights the first pixel, the others the second: importances differ fourfold."""
    pixels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    weight = torch.tensor([[1.0, -2.0], [3.0, 5.0]])
    task = linear_task(weight, pixels, [0, 1, 0, 1], forget=[0])
    found = weight_of(ssd.unlearn(task, SsdConfig(alpha=3, lambd=2)).model)
    torch.testing.assert_close(found, weight.double() * torch.tensor([2 / 4, 1.0]))
    untouched = ssd.unlearn(task, SsdConfig(alpha=5, lambd=2)).model
    assert torch.equal(weight_of(untouched), weight.double())


# ---- MU-Mis


def test_mu_mis_shrinks_the_labels_row_and_grows_the_other_classes() -> None:
    """z = W x: d z_y / d x is row y, so a step of gradient descent scales rows by 1 -+ 2 lr."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-1.0, 0.5]])
    task = linear_task(weight, torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 1.0]]), [1, 0, 2], forget=[0])
    settings = MuMisConfig(epochs=1, batch_size=1, lr=0.1, momentum=0, weight_decay=0)
    found = weight_of(mu_mis.unlearn(task, settings).model)
    other = int(mu_mis.draw_others(task.labels, 3, task.generator("mu_mis classes"))[0])
    scale = torch.ones(3, dtype=torch.float64)
    scale[1], scale[other] = 1 - 2 * 0.1, 1 + 2 * 0.1
    torch.testing.assert_close(found, scale.unsqueeze(1) * weight.double())


def test_mu_mis_draws_every_class_but_the_label() -> None:
    labels = torch.arange(4).repeat(200)
    found = mu_mis.draw_others(labels, 4, torch.Generator().manual_seed(0))
    assert not (found == labels).any()
    for label in range(4):
        counts = found[labels == label].bincount(minlength=4)
        assert counts[label] == 0
        assert counts.sum() == 200
        assert (counts[counts > 0] > 40).all()


class Attention(nn.Module):
    """A layer of attention over the entries of each image, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x[:, None, :, None])
        return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)))


def test_mu_mis_takes_second_derivatives_of_attention_and_says_where_there_are_none(spread: Task) -> None:
    given = replace(spread, original=Classifier(Attention()).eval())
    assert not same(run("mu_mis", given), given.original)
    with pytest.raises(UserError, match="which `activation_checkpointing=True` does not give"):
        mu_mis.check(replace(spread, runtime=Runtime(activation_checkpointing=True)), MuMisConfig())
    without = Classifier(nn.Sequential(nn.Linear(6, 3), nn.Hardsigmoid(), nn.Linear(3, 3)))
    with pytest.raises(UserError, match="'mu_mis' takes second derivatives, which this network does"):
        mu_mis.check(replace(spread, original=without), MuMisConfig())


def test_mu_mis_takes_batches_in_parts_and_gives_the_same(spread: Task) -> None:
    found = run("mu_mis", replace(spread, runtime=Runtime(accumulate=2)))
    expected = run("mu_mis", spread)
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()))


def test_mu_mis_leaves_batchnorm_statistics_as_they_were(spread: Task) -> None:
    found, before = run("mu_mis", spread).network[1], spread.original.network[1]
    assert torch.equal(found.running_mean, before.running_mean)
    assert torch.equal(found.running_var, before.running_var)
    assert found.num_batches_tracked == before.num_batches_tracked


# ---- head only


@pytest.mark.parametrize("forgotten", ["spread", "classwise"])
def test_head_only_leaves_every_feature_as_it_was(forgotten: str, request: pytest.FixtureRequest) -> None:
    task: Task = request.getfixturevalue(forgotten)
    found = run("head_only", task)
    everything = torch.arange(len(task.labels))
    ours, theirs = (predict(model, task.images, everything) for model in (found, task.original))
    assert torch.equal(ours.features, theirs.features)
    changed = {
        name
        for name, tensor in found.network.state_dict().items()
        if not torch.equal(tensor, task.original.network.state_dict()[name])
    }
    assert changed == {"3.weight", "3.bias"}


def test_head_only_hides_a_class_and_keeps_the_others(classwise: Task) -> None:
    found, split = run("head_only", classwise), classwise.split
    assert right(classwise, classwise.original, split.forget) > 90
    assert right(classwise, found, split.forget) < 2
    assert right(classwise, found, split.retain) >= right(classwise, classwise.original, split.retain) - 1


def test_a_class_taken_out_leaves_the_others_their_ratios() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)
    found = without_classes(p.log(), torch.tensor([1])).exp()
    expected = torch.tensor([[5 / 7, 0, 2 / 7], [0.25, 0, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_stand_ins_have_the_same_label_where_there_is_one() -> None:
    unseen = torch.tensor([0, 1, 1, 0, 1])
    labels = torch.tensor([1, 0, 1, 2, 1, 0] * 20)
    found = draw_stand_ins(labels, unseen, torch.Generator().manual_seed(0))
    known = labels < 2
    assert torch.equal(unseen[found[known]], labels[known])
    assert set(found[labels == 1].tolist()) == {1, 2, 4}
    assert set(found[~known].tolist()) <= {0, 1, 2, 3, 4}


def test_head_only_needs_a_head_that_may_change(spread: Task) -> None:
    model = spread.fresh(0)
    model.head.requires_grad_(False)
    frozen = replace(spread, original=model)
    with pytest.raises(UserError, match="changes the last layer, which is frozen"):
        head_only.check(frozen, HeadOnlyConfig())
