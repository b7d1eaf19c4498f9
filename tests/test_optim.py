"""The masked optimisers: torch.optim and masking over 1,000 steps, its API, and every mistake."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dau_fast.ops import _native, pack_mask
from dau_fast.optim import MaskedAdamW, MaskedOptimizer, MaskedSGD

Settings = dict[str, Any]
KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Settings]] = {
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 0.02}),
    "momentum": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    ),
    "nesterov": (MaskedSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "maximize": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 1e-4, "momentum": 0.5, "maximize": True, "weight_decay": 0.1},
    ),
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "adamw, lr a tensor": (MaskedAdamW, torch.optim.AdamW, {"lr": torch.tensor(1e-3), "betas": (0.8, 0.99)}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["extension", "plain"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(_native, "extension", None)
    elif _native.extension is None:
        pytest.skip("dau_fast._C is not built")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 36, 4)
    return nn.Sequential(*layers)


def random_masks(model: nn.Module, kept: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(p.shape, generator=generator) < kept
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randn(6, 3, 8, 8, generator=generator)
        yield x, torch.randint(4, (6,), generator=generator)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


@torch.no_grad()
def mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, keep in masks.items():
        model.get_parameter(name).masked_fill_(~keep, 0)


def states(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    return [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]


def assert_exactly_zero(model: nn.Module, optimizer: Any, masks: Mapping[str, Tensor]) -> None:
    for name, keep in masks.items():
        parameter = model.get_parameter(name)
        for tensor in (parameter.detach(), *states(optimizer, parameter)):
            assert (tensor[~keep].view(torch.int32) == 0).all()
            assert (tensor[keep] != 0).any()


# ---- the same as torch.optim and masking


@every_kind
@pytest.mark.usefixtures("_path")
def test_a_thousand_steps_equal_torch_and_masking(kind: str) -> None:
    """Two layouts at once. Gradients are a smooth function of torch's own weights, which are float64."""
    make, usual, given = KINDS[kind]
    ours = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3).to(memory_format=torch.channels_last))
    masks = random_masks(ours)
    theirs = copy.deepcopy(ours).double()
    mask(theirs, masks)
    optimizer = make(ours.named_parameters(), masks, **given)
    expected = usual(theirs.parameters(), **given)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    for step in range(1000):
        for one, other in pairs:
            other.grad = (3 * other.detach() + step).cos()
            one.grad = other.grad.float()
        optimizer.step()
        expected.step()
        mask(theirs, masks)
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    assert_exactly_zero(ours, optimizer, masks)


@every_kind
def test_construction_zeroes_and_leaves_kept_weights_alone(kind: str) -> None:
    make, _, given = KINDS[kind]
    model = network()
    with torch.no_grad():
        model.get_parameter("4.weight")[:, ::7] = float("nan")
    before, masks = copy.deepcopy(model), random_masks(model)
    make(model.named_parameters(), masks, **given)
    for name, parameter in model.named_parameters():
        original = before.get_parameter(name)
        keep = masks.get(name, torch.ones_like(original, dtype=torch.bool))
        torch.testing.assert_close(
            parameter, torch.where(keep, original, 0.0), equal_nan=True, rtol=0, atol=0
        )


def test_packed_masks_and_mappings_of_them() -> None:
    class Packed(dict[str, Tensor]):
        asked = 0

        def packed(self, name: str) -> Tensor:
            self.asked += 1
            return pack_mask(self[name])

    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        masks = random_masks(network())
        whole = Packed(masks)
        for form in (masks, {name: pack_mask(m) for name, m in masks.items()}, whole):
            model = network().to(memory_format=layout)
            optimizer = MaskedSGD(model.named_parameters(), form, lr=0.1)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert whole.asked == len(masks)
    assert all(torch.equal(result, results[0]) for result in results)


# ---- the API of torch.optim


@every_kind
def test_state_dict_round_trip_goes_on_as_if_uninterrupted(kind: str) -> None:
    make, _, given = KINDS[kind]
    first = network()
    masks = random_masks(first)
    optimizer = make(first.named_parameters(), masks, **given)
    steps = list(batches(6))
    for x, y in steps[:3]:
        backward(first, x, y)
        optimizer.step()
    second = copy.deepcopy(first)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    resumed = make(second.named_parameters(), masks, **{**given, "lr": 7.0})
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for x, y in steps[3:]:
        for model, one in ((first, optimizer), (second, resumed)):
            backward(model, x, y)
            one.step()
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@every_kind
def test_state_of_torch_is_taken_over_and_masked(kind: str) -> None:
    make, usual, given = KINDS[kind]
    model = network()
    optimizer = usual(model.parameters(), **given)
    for x, y in batches(2):
        backward(model, x, y)
        optimizer.step()
    masks = random_masks(model)
    ours = make(model.named_parameters(), masks, **given)
    ours.load_state_dict(optimizer.state_dict())
    assert_exactly_zero(model, ours, masks)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_their_masks(copied: Callable[[Any], Any]) -> None:
    model = network()
    masks = random_masks(model)
    model, optimizer = copied((model, MaskedSGD(model.named_parameters(), masks, lr=0.1, momentum=0.9)))
    for x, y in batches(2):
        backward(model, x, y)
        optimizer.step()
    assert_exactly_zero(model, optimizer, masks)


def test_groups_schedulers_and_closures() -> None:
    model, theirs = network(), network()
    masks = random_masks(model)
    mask(theirs, masks)

    def groups(m: nn.Module) -> list[Settings]:
        named = list(m.named_parameters())
        return [{"params": named[:2], "lr": 0.3}, {"params": named[2:], "weight_decay": 0.1}]

    optimizer = MaskedSGD(groups(model), masks, lr=0.1, momentum=0.9)
    expected = torch.optim.SGD(groups(theirs), lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, expected)]
    for x, y in batches(4):

        def closure(m: nn.Module = model, x: Tensor = x, y: Tensor = y) -> float:
            assert torch.is_grad_enabled()
            backward(m, x, y)
            return 3.5

        assert optimizer.step(closure) == 3.5
        backward(theirs, x, y)
        expected.step()
        mask(theirs, masks)
        for schedule in schedules:
            schedule.step()
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert optimizer.param_groups[0]["lr"] == 0.3 / 16


def test_a_later_group_has_masks_of_its_own() -> None:
    model = network()
    named = list(model.named_parameters())
    masks = random_masks(model)
    optimizer = MaskedSGD(named[:2], {"0.weight": masks["0.weight"]}, lr=0.1)
    optimizer.add_param_group({"params": named[2:]}, masks)
    backward(model, *next(batches(1)))
    optimizer.step()
    assert_exactly_zero(model, optimizer, masks)


def test_a_scaler_skips_a_step_that_overflowed() -> None:
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = MaskedAdamW(model.named_parameters(), random_masks(model))
    x, y = next(batches(1))
    before = copy.deepcopy(model)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = torch.equal(model.get_parameter("4.weight"), before.get_parameter("4.weight"))
        assert unchanged == (factor != 1.0)
    for parameter in model.parameters():
        assert parameter.isfinite().all()


def test_parameters_without_a_gradient_stay() -> None:
    model = network()
    optimizer = MaskedSGD(model.named_parameters(), random_masks(model), lr=0.1, momentum=0.9)
    model.get_parameter("0.bias").grad = torch.ones(5)
    before = copy.deepcopy(model)
    optimizer.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed == ["0.bias"]
    assert len(optimizer.state) == 1


def test_shared_parameters_are_stepped_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    keep = torch.rand(4, 4) < 0.5
    named = list(model.named_parameters(remove_duplicate=False))
    assert len(named) == 2
    optimizer = MaskedSGD(named, {"0.weight": keep}, lr=1.0)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, (before - 1) * keep)


@pytest.mark.parametrize("kind", ["momentum", "adamw, lr a tensor"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_step_itself_compiles(kind: str, backend: str) -> None:
    torch.compiler.reset()
    make, _, given = KINDS[kind]
    models = network(), network()
    masks = random_masks(models[0])
    optimizers = [make(model.named_parameters(), masks, **given) for model in models]
    compiled = torch.compile(optimizers[0].step, backend=backend)
    for x, y in batches(3):
        for model, step in zip(models, (compiled, optimizers[1].step), strict=True):
            backward(model, x, y)
            step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert_exactly_zero(models[0], optimizers[0], masks)


# ---- mistakes


def test_mistakes_are_named() -> None:
    model = network()
    masks = random_masks(model)
    named = list(model.named_parameters())
    with pytest.raises(ValueError, match=r"params have no names.*: pass model.named_parameters\(\)"):
        MaskedSGD(model.parameters(), masks)
    with pytest.raises(
        ValueError, match=r"masks has 'head.weight', which is none of the 6 parameters.*another"
    ):
        MaskedSGD(named, {**masks, "head.weight": masks["4.weight"]})
    with pytest.raises(ValueError, match=r"mask of 4.weight has shape \[180, 4\], its tensor \[4, 180\]"):
        MaskedAdamW(named, {"4.weight": masks["4.weight"].T})
    with pytest.raises(ValueError, match=r"mask of 4.weight is float32: expected bool, or uint8"):
        MaskedAdamW(named, {"4.weight": masks["4.weight"].float()})
    with pytest.raises(ValueError, match=r"params is a tensor"):
        MaskedSGD(torch.ones(3), masks)  # type: ignore[arg-type]
    for settings in ({"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=rf"^{next(iter(settings))} is .*: expected 0 or more"):
            MaskedSGD(named, masks, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lr has shape \[2\]: expected one element"):
        MaskedSGD(named, masks, lr=torch.ones(2))
    with pytest.raises(ValueError, match=r"nesterov needs a momentum"):
        MaskedSGD(named, masks, nesterov=True)
    with pytest.raises(ValueError, match=r"betas are \(0.9, 1.0\)"):
        MaskedAdamW(named, masks, betas=(0.9, 1.0))


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_first_step_in_a_cuda_graph_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would set the state to zero at every replay."""
    make, _, given = KINDS[kind]
    model = network()
    optimizer = make(model.named_parameters(), {}, **given)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(RuntimeError, match=r"a parameter's first step is being captured.*call step\(\) once"):
        optimizer.step()
    assert not any(optimizer.state.values())
    capturing = False
    optimizer.step()
    capturing = True
    optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = MaskedSGD(model.named_parameters(), {}, lr=0.1)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="a gradient is sparse"):
        optimizer.step()


# ---- what does not fit is refused before memory is touched


def stepped(make: type[MaskedOptimizer], *shape: int) -> tuple[nn.Parameter, MaskedOptimizer]:
    """A parameter "w" that was stepped once, half of it masked, and its optimiser."""
    parameter = nn.Parameter(torch.ones(*shape))
    keep = torch.arange(parameter.numel()).view(shape) % 2 == 0
    more = {"momentum": 0.9} if make is MaskedSGD else {}
    optimizer = make([("w", parameter)], {"w": keep}, lr=0.1, **more)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("other", [(16,), (10_000,), (8, 8)])
def test_the_state_of_another_model_is_refused(make: type[MaskedOptimizer], other: tuple[int, ...]) -> None:
    parameter, optimizer = stepped(make, 64)
    before = copy.deepcopy(optimizer.state_dict()["state"]), parameter.detach().clone()
    with pytest.raises(ValueError, match=r"of w has shape .* expected a dense tensor of shape \[64\]"):
        optimizer.load_state_dict(stepped(make, *other)[1].state_dict())
    torch.testing.assert_close(optimizer.state_dict()["state"], before[0], rtol=0, atol=0)
    optimizer.step()
    assert not torch.equal(parameter, before[1])


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("size", [16, 10_000])
def test_a_parameter_of_another_size_is_refused(make: type[MaskedOptimizer], size: int) -> None:
    parameter, optimizer = stepped(make, 64)
    parameter.data = torch.ones(size)
    parameter.grad = torch.ones(size)
    with pytest.raises(ValueError, match=rf"w had shape \[64\] and now has \[{size}\]"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(size))


def test_a_step_that_is_no_number_is_refused() -> None:
    _, optimizer = stepped(MaskedAdamW, 64)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] = torch.empty(0)
    with pytest.raises(ValueError, match="expected step, one number"):
        optimizer.load_state_dict(state)


def test_a_state_that_was_swapped_for_a_shorter_one_is_refused() -> None:
    parameter, optimizer = stepped(MaskedSGD, 64)
    optimizer.state[parameter]["momentum_buffer"] = torch.ones(16)
    with pytest.raises(ValueError, match="momenta"):
        optimizer.step()


# ---- what a step keeps for the next


def train_with(kind: type, change: Callable[[Any, nn.Module], None] | None, plans: bool) -> list[Tensor]:
    """Weights after steps with something in between; plans: whether what was found in one serves the next."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.ndim > 1}
    more = {"momentum": 0.9} if kind is MaskedSGD else {}
    optimizer = kind(model.named_parameters(), masks, lr=0.01, **more)
    for step in range(6):
        for place, p in enumerate(model.parameters()):
            p.grad = (p.detach() + step + place).cos()
        if step == 3 and change:
            change(optimizer, model)
        if not plans:
            optimizer._plans.clear()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def lose_a_gradient(_: Any, model: nn.Module) -> None:
    model[0].weight.grad = None


def begin_anew(optimizer: Any, _: nn.Module) -> None:
    optimizer.state.clear()


def load(optimizer: Any, _: nn.Module) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        for key in ("momentum_buffer", "exp_avg"):
            if key in entry:
                entry[key] = entry[key] + 1
    optimizer.load_state_dict(state)


def replace_one_state(optimizer: Any, model: nn.Module) -> None:
    state = optimizer.state[model[1].weight]
    key = "exp_avg" if "exp_avg" in state else "momentum_buffer"
    state[key] = torch.zeros_like(state[key])


def move_a_weight(_: Any, model: nn.Module) -> None:
    model[0].bias.data = model[0].bias.detach().clone() + 1


def change_a_gradients_layout(_: Any, model: nn.Module) -> None:
    weight = model[0].weight
    weight.grad = weight.grad.contiguous(memory_format=torch.contiguous_format)


CHANGES = [
    None, lose_a_gradient, begin_anew, load, replace_one_state, move_a_weight, change_a_gradients_layout,
]  # fmt: skip


@pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change and change.__name__)
def test_what_changes_between_steps_is_seen(
    kind: type, change: Callable[[Any, nn.Module], None] | None
) -> None:
    for one, other in zip(train_with(kind, change, True), train_with(kind, change, False), strict=True):
        assert torch.equal(one, other)


def test_a_momentum_that_comes_later_is_seen() -> None:
    found = []
    for plans in (True, False):
        weight = nn.Parameter(torch.ones(5))
        optimizer = MaskedSGD([("w", weight)], {}, lr=0.1)
        for step in range(4):
            weight.grad = torch.full((5,), 1.0 + step)
            optimizer.param_groups[0]["momentum"] = 0.9 * (step > 1)
            if not plans:
                optimizer._plans.clear()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_a_second_step_looks_at_nothing_but_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    optimizer = MaskedSGD(model.named_parameters(), {}, lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()

    def walk(self: Any, parameters: Any) -> Any:
        raise AssertionError("the parameters are walked over again")

    monkeypatch.setattr(MaskedOptimizer, "_with_gradients", walk)
    optimizer.step()
