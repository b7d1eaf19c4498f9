"""Gradients image by image: against a loop, in chunks, of pruned networks, and where there are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import TENTH, trained

from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.methods import sample_gradients
from dau_fast.methods.registry import get_method
from dau_fast.methods.sample_gradients import SampleGradients, flat_parameters, set_parameters
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.prune import Masks


@pytest.fixture(scope="module")
def task() -> Task:
    found = trained(TENTH)
    found.original.double()
    return replace(found, images=replace(found.images, pixels=found.images.pixels.double()))


def one_by_one(task: Task, index: Tensor) -> Tensor:
    """[N, P], by N backward passes."""
    rows = []
    for image in index:
        logits = task.original(task.images.batch(image[None])).logits
        loss = F.cross_entropy(logits, task.labels[image[None]])
        grads = torch.autograd.grad(loss, list(task.original.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("held", [2**27, 1000, 1])
def test_sums_are_those_of_a_loop_in_chunks_of_any_size(
    held: int, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_gradients, "HELD", held)
    index = task.split.forget
    expected, found = one_by_one(task, index), SampleGradients(task.original, task, index)
    torch.testing.assert_close(found.squares(), expected.square().mean(0))
    torch.testing.assert_close(found.total(), expected.sum(0))
    v = torch.randn(expected.shape[1], dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(found.sum(lambda g: g.T @ (g @ v)), expected.T @ (expected @ v))
        found.hold()
    assert (found._held is not None) == (held == 2**27)


def test_no_chunk_holds_more_than_it_says(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = flat_parameters(task.original).numel()
    monkeypatch.setattr(sample_gradients, "HELD", 3 * parameters + 1)
    seen: list[int] = []

    def look(gradients: Tensor) -> Tensor:
        seen.append(len(gradients))
        return gradients.sum(0)

    SampleGradients(task.original, task, task.split.forget[:8]).sum(look)
    assert seen == [3, 3, 2]


def test_the_model_stays_as_it_was(task: Task) -> None:
    index, model = task.split.forget, task.original
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train().zero_grad(set_to_none=True)
    SampleGradients(model, task, index).squares()
    SampleGradients(model, task, index).total()
    assert all(module.training for module in model.modules())
    model.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mixed_precision_changes_nothing(task: Task) -> None:
    model = task.fresh(0).eval()
    images = replace(task.images, pixels=task.images.pixels.float())
    given = replace(task, original=model, images=images)
    expected = SampleGradients(model, given, task.split.forget).squares()
    model.precision = torch.bfloat16
    assert torch.equal(SampleGradients(model, given, task.split.forget).squares(), expected)
    assert model.precision == torch.bfloat16


def test_masked_weights_have_no_gradient_and_stay_at_zero(task: Task) -> None:
    weight = task.original.network[0].weight
    mask = torch.arange(weight.numel()).view(weight.shape) % 3 > 0
    pruned = replace(task, masks=Masks({"0.weight": mask}))
    found = SampleGradients(pruned.original, pruned, task.split.forget)
    for vector in (found.squares(), found.total()):
        of_weight = vector[: weight.numel()].view(weight.shape)
        assert (of_weight[~mask] == 0).all()
        assert (of_weight[mask] != 0).any()
        assert (vector[weight.numel() :] != 0).any()
    model = task.fresh(0).double()
    set_parameters(model, torch.ones_like(flat_parameters(model)), pruned)
    assert torch.equal(model.network[0].weight.detach(), mask.double())
    assert (model.head.weight == 1).all()


def test_frozen_parameters_are_no_part_of_it(task: Task) -> None:
    model = task.fresh(0).double().eval()
    model.network[0].requires_grad_(False)
    frozen = model.network[0].weight.clone()
    assert len(SampleGradients(model, task, task.split.forget).squares()) == 64 + 99
    set_parameters(model, torch.zeros(64 + 99).double(), task)
    assert torch.equal(model.network[0].weight, frozen)
    assert (model.head.weight == 0).all()


class Branching(nn.Sequential):
    """Looks at the numbers themselves, which no batched gradient can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum().item() > 0 else -x)


@pytest.mark.parametrize("name", ["fisher", "influence", "ssd"])
def test_a_network_without_them_is_refused_before_anything_runs(name: str, task: Task) -> None:
    odd = replace(task, original=Classifier(Branching(nn.Linear(6, 3).double())))
    method = get_method(name)
    with pytest.raises(UserError, match=f"^method '{name}' takes gradients image by image, which"):
        method.check(odd, method.resolve(odd))


@pytest.mark.parametrize("name", ["fisher", "influence", "ssd", "mu_mis", "head_only"])
def test_a_shared_out_model_is_refused(name: str, task: Task) -> None:
    shared = replace(task, runtime=Runtime(ranks=Ranks(0, 2), shard=True))
    method = get_method(name)
    with pytest.raises(UserError, match=rf"^method '{name}' computes on whole models: leave `shard` out"):
        method.check(shared, method.resolve(shared))
