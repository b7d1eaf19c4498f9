"""OMP, IMP, SynFlow and random pruning: how many weights go, which, and what is refused."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm
from toys import blobs

from dau_fast.errors import UserError
from dau_fast.models import build
from dau_fast.prune import Masks, imp, omp, random, synflow
from dau_fast.prune.imp import schedule
from dau_fast.prune.select import keep_largest

Prune = Callable[..., Masks]


def _imp(model: nn.Module, sparsity: float, **options: object) -> Masks:
    return imp(model, sparsity, lambda model, masks: None, **options)


def _synflow(model: nn.Module, sparsity: float, **options: object) -> Masks:
    return synflow(model, sparsity, input_shape=(1, 8, 8), iterations=10, **options)


METHODS: dict[str, Prune] = {"omp": omp, "imp": _imp, "synflow": _synflow, "random": random}
every_method = pytest.mark.parametrize("method", METHODS)


def small() -> nn.Module:
    torch.manual_seed(0)
    return build("small", 10, (1, 8, 8))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- how many


@every_method
@pytest.mark.parametrize("sparsity", [0, 0.001, 0.5, 0.9, 0.95, 0.9987])
@pytest.mark.parametrize("linear", [False, True])
def test_the_sparsity_is_exact_to_one_weight(method: str, sparsity: float, linear: bool) -> None:
    model = small()
    masks = METHODS[method](model, sparsity, linear=linear)
    layers = (nn.Conv2d, nn.Linear) if linear else nn.Conv2d
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}
    assert set(masks) == expected
    assert abs(masks.kept - (1 - sparsity) * masks.weights) < 1


@every_method
def test_in_the_scope_of_a_layer_each_layer_is_as_sparse(method: str) -> None:
    masks = METHODS[method](small(), 0.8, scope="layer")
    for name, mask in masks.items():
        assert abs(int(mask.sum()) - 0.2 * mask.numel()) < 1, name


@every_method
def test_the_same_twice_and_the_model_stays_as_it_was(method: str) -> None:
    model, prune = small(), METHODS[method]
    before = weights(model)
    first = prune(model, 0.9)
    assert model.training
    assert prune(model, 0.9) == first
    if method == "imp":
        first.apply_(model)  # what imp leaves
        assert torch.equal(model.stem[0].weight, before["stem.0.weight"] * first["stem.0.weight"])
    else:
        assert same(model, before)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_equal_scores_go_from_the_first_on(scope: str) -> None:
    scores = {"a": torch.tensor([2.0, 1.0, 1.0, 1.0]), "b": torch.tensor([[1.0, 1.0], [0.0, 3.0]])}
    kept = {name: mask.long().tolist() for name, mask in keep_largest(scores, 0.5, scope).items()}
    if scope == "global":
        assert kept == {"a": [1, 0, 0, 0], "b": [[1, 1], [0, 1]]}
    else:
        assert kept == {"a": [1, 0, 0, 1], "b": [[0, 1], [0, 1]]}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_what_is_pruned_already_goes_before_kept_zeros(scope: str) -> None:
    scores = {"a": torch.tensor([0.0, 9.0, 0.0, 1.0]), "b": torch.tensor([[8.0, 3.0], [0.0, 2.0]])}
    pruned = Masks({"a": torch.tensor([True, False, True, True]), "b": torch.ones(2, 2, dtype=torch.bool)})
    kept = keep_largest(scores, 0.25, scope, pruned)
    expected = {"a": [0, 0, 1, 1], "b": [[1, 1], [1, 1]]} if scope == "global" else {
        "a": [1, 0, 1, 1], "b": [[1, 1], [0, 1]],
    }  # fmt: skip
    assert {name: mask.long().tolist() for name, mask in kept.items()} == expected
    assert keep_largest(scores, 0.0, "global", pruned) == pruned


# ---- which


def test_omp_keeps_the_largest_weights_of_all_layers() -> None:
    model = small()
    masks = omp(model, 0.9)
    magnitudes = {name: dict(model.named_parameters())[name].detach().abs() for name in masks}
    kept = torch.cat([magnitudes[name][masks[name]] for name in masks])
    gone = torch.cat([magnitudes[name][~masks[name]] for name in masks])
    assert kept.min() >= gone.max()


def test_omp_takes_the_model_back_to_a_state_and_masks_it() -> None:
    model = small()
    early = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter))
        model.stem[1].running_mean.fill_(3)
    late = weights(model)
    masks = omp(model, 0.5, rewind=early)
    model.load_state_dict(late)
    assert masks == omp(model, 0.5)
    model.load_state_dict(early)
    assert masks != omp(model, 0.5)
    model.load_state_dict(late)
    omp(model, 0.5, rewind=early)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, early[name] * masks[name] if name in masks else early[name])


def test_imp_trains_prunes_a_fifth_and_rewinds() -> None:
    model, shrink = small(), torch.Generator().manual_seed(0)
    beginning = weights(model)
    seen: list[Masks | None] = []

    def train(model: nn.Module, masks: Masks | None) -> None:
        seen.append(masks)
        for name, tensor in model.state_dict().items():
            start = beginning[name]
            assert torch.equal(tensor, start if masks is None or name not in masks else start * masks[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.rand(parameter.shape, generator=shrink))

    masks = imp(model, 0.6, train)
    assert seen[0] is None
    found = [*seen[1:], masks]
    assert [round(each.sparsity, 3) for each in found if each] == [0.2, 0.36, 0.488, 0.59, 0.6]
    for earlier, later in itertools.pairwise(found):
        assert earlier is not None
        assert later is not None
        assert (earlier & later) == later
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, beginning[name] * masks[name] if name in masks else beginning[name])


@pytest.mark.parametrize(
    ("sparsity", "rounds", "first"),
    [(0.95, 14, 0.2), (0.2, 1, 0.2), (0.36, 2, 0.2), (0.1, 1, 0.1), (0, 1, 0)],
)
def test_the_rounds_of_imp(sparsity: float, rounds: int, first: float) -> None:
    targets = schedule(sparsity, 0.2)
    assert len(targets) == rounds
    assert targets[0] == pytest.approx(first)
    assert targets[-1] == sparsity
    assert targets == sorted(targets)


def test_synflow_scores_are_those_of_the_paths() -> None:
    """Two linear layers: the score of a weight is the flow through all paths that use it."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[-10.0, 1.0]]))
    # |first| times |second|: [[10, 20], [3, 4]]; second: [[30, 7]].
    masks = synflow(model, 2 / 6, input_shape=(2,), iterations=1, linear=True)
    assert masks["0.weight"].tolist() == [[True, True], [False, False]]
    assert masks["1.weight"].tolist() == [[True, True]]
    # The second iteration sees that nothing reaches the second layer's last weight any more.
    masks = synflow(model, 3 / 6, input_shape=(2,), iterations=2, linear=True)
    assert masks["0.weight"].tolist() == [[True, True], [False, False]]
    assert masks["1.weight"].tolist() == [[True, False]]


def test_synflow_leaves_a_path_where_magnitude_cuts_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4)))
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    assert omp(model, 0.95).emptied == ["2.weight"]
    assert not synflow(model, 0.95, input_shape=(8, 4, 4)).emptied


def test_synflow_scores_a_network_whose_flow_leaves_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(30)))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(10)
    flow = copy.deepcopy(model)
    with torch.no_grad():
        for layer in flow:
            layer.weight.abs_()
        assert flow(torch.ones(1, 8, 4, 4)).isinf().any()
    assert synflow(model, 0.9, input_shape=(8, 4, 4), iterations=3).sparsity == pytest.approx(0.9, abs=1e-4)


def test_random_masks_follow_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (random(small(), 0.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert 0.4 < (first & other).sparsity / (first.sparsity + other.sparsity - 0.25) < 1.1
    assert first != other
    torch.manual_seed(0)
    assert not torch.equal(torch.get_rng_state(), state)


def test_imp_finds_masks_with_which_the_blobs_are_learnt() -> None:
    images = blobs(240)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))

    def train(model: nn.Module, masks: Masks | None) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(images.pixels), images.labels).backward()
            optimizer.step()
            if masks:
                masks.apply_(model)

    masks = imp(model, 0.7, train, linear=True)
    train(model, masks)
    right = (model(images.pixels).argmax(1) == images.labels).float().mean()
    assert right > 0.9
    assert masks.sparsity == pytest.approx(0.7, abs=1e-3)


# ---- warnings and errors


@pytest.mark.parametrize("method", ["omp", "imp", "random"])
def test_an_emptied_layer_is_warned_about_by_name(method: str, caplog: pytest.LogCaptureFixture) -> None:
    def faint() -> nn.Module:
        model = small()
        with torch.no_grad():
            model.stem[0].weight.mul_(1e-6)
        return model

    with caplog.at_level(logging.WARNING, "dau_fast"):
        METHODS[method](faint(), 0.5, scope="layer")
        assert not caplog.records
        METHODS[method](faint(), 0.9999 if method == "random" else 0.5)
    (record,) = caplog.records
    assert "'stem.0.weight'" in record.getMessage()
    assert "blocks.2.branch.3" not in record.getMessage() or method == "random"


@every_method
@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan"), float("inf")])
def test_a_sparsity_outside_is_refused(method: str, sparsity: float) -> None:
    with pytest.raises(UserError, match=r"`sparsity=.*`: expected a share of the weights, from 0 to below 1"):
        METHODS[method](small(), sparsity)


@every_method
def test_an_unknown_scope_is_refused(method: str) -> None:
    with pytest.raises(UserError, match="`scope=all`: expected one of global, layer"):
        METHODS[method](small(), 0.5, scope="all")


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(method: str, value: float) -> None:
    model = small()
    with torch.no_grad():
        model.blocks[0].branch[0].weight[0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"'blocks\.0\.branch\.0\.weight' holds NaN or infinity"):
        METHODS[method](model, 0.5)


@every_method
def test_a_model_without_such_weights_is_refused(method: str) -> None:
    with pytest.raises(UserError, match="Sequential has no convolution to prune"):
        METHODS[method](nn.Sequential(nn.Linear(2, 2)), 0.5)
    with pytest.raises(UserError, match="no convolution and no Linear layer"):
        METHODS[method](nn.Sequential(nn.ReLU()), 0.5, linear=True)


@every_method
def test_a_layer_under_pytorchs_pruning_is_refused_by_name(method: str) -> None:
    model = small()
    torch_prune.random_unstructured(model.stem[0], "weight", 0.5)
    with pytest.raises(UserError, match=r"layer 'stem\.0' is computed from other parameters"):
        METHODS[method](model, 0.5)


@every_method
def test_a_shared_weight_counts_once(method: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    other = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    other.weight = conv.weight
    model = nn.Sequential(conv, other, conv)
    masks = METHODS[method](model, 5 / 9)
    assert list(masks) == ["0.weight"]
    assert masks.kept == 4


def test_layers_that_are_not_pruned_may_be_of_any_kind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), weight_norm(nn.Linear(2, 2)))
    assert list(omp(model, 0.5)) == ["0.weight"]
    with pytest.raises(UserError, match="layer '1' is computed"):
        omp(model, 0.5, linear=True)


def test_a_weight_shared_with_another_kind_of_layer_counts() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["words"].weight
    masks = omp(model, 0.5, linear=True)
    masks.apply_(model)
    assert list(masks) == ["head.weight"]
    assert int((model["words"].weight == 0).sum()) == 6


def test_synflow_refuses_an_input_that_does_not_fit_and_no_iterations() -> None:
    with pytest.raises(UserError, match=r"cannot take an input of shape \[3, 8, 8\]: .*input_shape"):
        synflow(small(), 0.5, input_shape=(3, 8, 8))
    with pytest.raises(UserError, match="`iterations=0`: expected 1 or more"):
        synflow(small(), 0.5, input_shape=(1, 8, 8), iterations=0)


@pytest.mark.parametrize("rate", [0, 1, -1, float("nan")])
def test_imp_refuses_a_rate_outside(rate: float) -> None:
    with pytest.raises(UserError, match=f"`rate={rate:g}`: expected a share"):
        imp(small(), 0.5, lambda model, masks: None, rate=rate)
