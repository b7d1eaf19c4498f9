"""Layers that run fused during a step compute what they compute otherwise, and are as before afterwards."""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchvision.models.resnet import BasicBlock
from toys import batches_of

from dau_fast import models
from dau_fast.data.images import Images
from dau_fast.engine import fused_layers as module
from dau_fast.engine import loop, steps
from dau_fast.engine.fused_layers import FusedBatchNorm2d, fused_layers
from dau_fast.engine.losses import Losses
from dau_fast.engine.ranks import ALONE
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.training import make_loop
from dau_fast.models import Classifier, SmallResNet
from dau_fast.ops import per_sample_grad_norms
from dau_fast.ops.batch_norm import FusedBatchNorm

CUDA = torch.device("cuda")
# Whether something is added, and whether a ReLU follows.
Call = tuple[bool, bool]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Those of `batch_norm`, as they come."""
    seen: list[Call] = []
    computed = module.batch_norm

    def noted(*given: Any, add: Tensor | None, relu: bool, **named: Any) -> Tensor:
        seen.append((add is not None, relu))
        return computed(*given, add=add, relu=relu, **named)

    monkeypatch.setattr(module, "batch_norm", noted)
    return seen


@pytest.fixture(params=["PyTorch's own", "the ops"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `batch_norm` runs on a CPU, and the backward pass that it has on CUDA."""
    if request.param == "the ops":
        monkeypatch.setattr(sys.modules["dau_fast.ops.batch_norm"], "_one_by_one", FusedBatchNorm.apply)


def network(arch: str, size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(arch, 10, (3, size, size)).double()
    return model.to(memory_format=torch.channels_last)


def layers(*chosen: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *chosen).double()


def images(count: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, gradients and buffers after a step, with the same dropout whenever it is called."""
    torch.manual_seed(2)
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), *grads, *(buffer.clone() for buffer in model.buffers())]


def assert_same(model: nn.Module, x: Tensor, taken: int = 1) -> None:
    """As it is, and as its copy is inside."""
    other = copy.deepcopy(model)
    for _ in range(taken):
        expected = results(model, x)
        with fused_layers(other):
            found = results(other, x)
        for one, exact in zip(found, expected, strict=True):
            assert one.dtype == exact.dtype
            # Of numbers in a tensor that are 0 but for rounding, nothing is asked.
            assert (one - exact).double().norm() <= 1e-9 * exact.double().norm() + 1e-12


# ---- what known networks compute


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "small", "vgg16", "mobilenet_v2"])
def test_outputs_gradients_and_statistics_are_the_same(arch: str) -> None:
    assert_same(network(arch), images())


def test_they_are_as_exact_on_the_device(device: torch.device) -> None:
    model, x = network("resnet18"), images()
    exact, off = results(copy.deepcopy(model), x), []
    for chosen in (False, True):
        other = copy.deepcopy(model).float().to(device)
        with fused_layers(other if chosen else nn.Identity()):
            found = results(other, x.float().to(device))
        pairs = zip(found, exact, strict=True)
        # Of all of them together: which ReLUs let through what is near 0 is chance.
        squares = [((one.cpu() - two).double().norm() / two.double().norm()).square() for one, two in pairs]
        off.append(torch.stack(squares).mean().sqrt().item())
    assert off[1] <= 3 * max(off[0], 1e-6), off
    assert off[1] < 1e-2


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        # A ReLU6 is none, and shortcuts have nothing behind them.
        ("resnet18", {(False, False): 3, (False, True): 9, (True, True): 8}),
        ("resnet50", {(False, False): 4, (False, True): 33, (True, True): 16}),
        ("small", {(False, False): 2, (False, True): 4, (True, True): 3}),
        ("vgg16", {(False, True): 13}),
        ("mobilenet_v2", {(False, False): 52}),
    ],
)
def test_what_follows_a_batchnorm_is_joined_with_it(
    arch: str, expected: dict[Call, int], calls: list[Call]
) -> None:
    model = network(arch)
    with fused_layers(model):
        model(images(2))
    assert Counter(calls) == expected
    model(images(2))
    assert len(calls) == sum(expected.values())


# ---- what is not to be seen of it


def kinds(model: nn.Module) -> list[type]:
    return [type(layer) for layer in model.modules()]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "small"])
def test_classes_are_back_afterwards(arch: str) -> None:
    model = network(arch)
    before, names = kinds(model), list(model.state_dict())
    twin = copy.deepcopy(model)
    with fused_layers(model):
        assert FusedBatchNorm2d in kinds(model)
        assert list(model.state_dict()) == names
        assert kinds(twin) == before, "a copy made outside"
        with fused_layers(model):
            model(images(2))
        assert FusedBatchNorm2d in kinds(model)
    assert kinds(model) == before


def test_classes_are_back_after_an_exception() -> None:
    model = network("resnet18")
    before = kinds(model)
    with pytest.raises(RuntimeError, match="channels"), fused_layers(model):
        model(torch.zeros(2, 5, 32, 32, dtype=torch.float64))
    assert kinds(model) == before


@pytest.mark.parametrize("arch", ["resnet18", "small", "mobilenet_v2"])
def test_in_evaluation_mode_nothing_changes(arch: str, calls: list[Call]) -> None:
    model = network(arch).eval()
    assert_same(model, images())
    assert calls == []


def test_per_sample_norms_know_the_layer(caplog: pytest.LogCaptureFixture) -> None:
    model, x = network("small", 8).eval(), images(3, 8)
    expected = per_sample_grad_norms(model, x, torch.tensor([0, 4, 9]))
    with fused_layers(model), caplog.at_level(logging.WARNING):
        found = per_sample_grad_norms(model, x, torch.tensor([0, 4, 9]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert caplog.records == []


# ---- layers that are not as usual


def without_bias() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4)
    norm.register_parameter("bias", None)
    return norm


def no_longer_tracked() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4)
    norm.track_running_stats = False
    return norm


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (lambda: nn.BatchNorm2d(4), [(False, True)]),
        (lambda: nn.BatchNorm2d(4, momentum=0.0), [(False, True)]),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), [(False, True)]),
        (no_longer_tracked, [(False, True)]),
        (lambda: nn.BatchNorm2d(4).eval(), []),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(), []),
        (lambda: nn.BatchNorm2d(4, affine=False), []),
        (lambda: nn.BatchNorm2d(4, momentum=None), []),
        (without_bias, []),
    ],
    ids=["usual", "momentum 0", "no statistics", "statistics at rest", "frozen", "frozen without statistics",
         "not affine", "plain means", "no bias"],
)  # fmt: skip
def test_any_batchnorm_is_pytorchs(
    norm: Callable[[], nn.BatchNorm2d], expected: list[Call], calls: list[Call]
) -> None:
    assert_same(layers(norm(), nn.ReLU(inplace=True)), images(size=8), taken=3)
    assert calls == 3 * expected


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU6, nn.Identity, nn.LeakyReLU])
def test_another_activation_stays_what_it_is(activation: type[nn.Module], calls: list[Call]) -> None:
    block = BasicBlock(4, 4)
    block.relu = activation()
    assert_same(layers(nn.BatchNorm2d(4), activation(), block), images(size=8))
    assert calls == 3 * [(False, False)]


@pytest.mark.usefixtures("_path")
def test_what_is_added_may_be_of_another_dtype() -> None:
    """As under autocast, where something in float32 comes before a block."""
    block = BasicBlock(3, 3)
    x = images(size=8).float().requires_grad_()
    found = []
    for chosen in (nn.Identity(), block):  # whose layers are to be fused
        with torch.autocast("cpu", torch.bfloat16), fused_layers(chosen):
            out = block(x)
        assert out.dtype == torch.bfloat16
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    for expected, other in zip(*found, strict=True):
        assert (other - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.usefixtures("_path")
def test_a_result_may_be_changed_in_place() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    model = layers(nn.BatchNorm2d(4), Doubled(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True))
    assert_same(model, images(size=8))


# ---- hooks

HOOKS = [
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
]  # fmt: skip


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_layer_with_a_hook_is_called_as_a_layer(kind: str, place: int, calls: list[Call]) -> None:
    model, seen = layers(nn.BatchNorm2d(4), nn.ReLU()), []
    getattr(model[place], kind)(lambda layer, *_: seen.append(layer))
    with fused_layers(model):
        results(model, images(size=8))
    assert seen == [model[place]]
    assert calls == [(False, False)]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(
    ("part", "times", "expected"),
    [
        ("bn1", 1, [(False, False), (True, True)]),
        ("bn2", 1, [(False, True), (False, False)]),
        ("relu", 2, [(False, False), (False, False)]),
    ],
)
def test_in_a_block_too(part: str, times: int, expected: list[Call], kind: str, calls: list[Call]) -> None:
    block, seen = BasicBlock(3, 3).double(), []
    block.relu.inplace = False  # PyTorch has no hook before a change in place
    layer = block.get_submodule(part)
    getattr(layer, kind)(lambda layer, *_: seen.append(layer))
    with fused_layers(block):
        results(block, images(size=8).requires_grad_())
    assert seen == [layer] * times
    assert calls == expected


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("part", "left"), [("branch", 2), ("branch.4", 2), ("shortcut", 3)])
def test_in_a_block_of_small_too(part: str, left: int, kind: str, calls: list[Call]) -> None:
    model, seen = network("small"), []
    layer = model.get_submodule("blocks.1").get_submodule(part)
    getattr(layer, kind)(lambda layer, *_: seen.append(layer))
    with fused_layers(model):
        results(model, images())
    assert seen == [layer]
    assert calls.count((True, True)) == left


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", ["bn1", "relu"])
def test_in_a_resnets_stem_too(part: str, kind: str, calls: list[Call]) -> None:
    model, seen = network("resnet18"), []
    model.get_submodule("relu").inplace = False  # PyTorch has no hook before a change in place
    layer = model.get_submodule(part)
    getattr(layer, kind)(lambda layer, *_: seen.append(layer))
    with fused_layers(model):
        results(model, images())
    assert seen == [layer]
    assert calls[0] == (False, False)


def test_a_hook_of_all_modules_sees_each_of_them(calls: list[Call]) -> None:
    model, seen = layers(nn.BatchNorm2d(4), nn.ReLU()), []
    hook = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        with fused_layers(model):
            model(images(size=8))
    finally:
        hook.remove()
    assert seen == [*model, model]
    assert calls == [(False, False)]


# ---- in a loop


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models whose layers a loop runs fused, once for each time."""
    seen: list[nn.Module] = []

    @contextmanager
    def noted(model: nn.Module) -> Iterator[None]:
        seen.append(model)
        with fused_layers(model):
            yield

    monkeypatch.setattr(loop, "fused_layers", noted)
    monkeypatch.setattr(steps, "_compile", lambda function: lambda *given: function(*given))
    return seen


def prepared(
    runtime: Runtime, compilable: str | None = None
) -> tuple[steps.Prepared, Classifier, tuple[Tensor, ...]]:
    """A step of `small` on tensors of the CPU, whatever the runtime's device is."""
    model = Classifier(SmallResNet(3, 4))
    held = Images(images(8, 8).float(), torch.arange(8) % 4, tuple("abcd"))
    batches = batches_of(held, itertools.repeat(torch.arange(8)))
    made = make_loop(model, batches, steps=2, optimizer=SGD(model.parameters(), lr=0.1))
    made = replace(made, compilable=compilable)
    model.train()
    inputs = made.inputs(next(made.batches))
    return loop.prepare_loop(made, inputs, runtime, Losses(torch.device("cpu"), ALONE)), model, inputs


@pytest.mark.parametrize("parts", [1, 2])
def test_eager_steps_on_cuda_are_fused(parts: int, entered: list[nn.Module], calls: list[Call]) -> None:
    found, model, inputs = prepared(Runtime(CUDA, accumulate=parts))
    assert entered == [model] * parts, "the rehearsal"
    found.step(*inputs)
    assert entered == [model] * 2 * parts
    assert len(calls) == 9 * len(entered)
    assert FusedBatchNorm2d not in kinds(model)


def test_compiled_steps_are_left_to_the_compiler(entered: list[nn.Module]) -> None:
    found, model, inputs = prepared(Runtime(CUDA, engine="compiled"))
    assert found.engine == "compiled"
    assert entered == [model], "rehearsed eagerly"
    found.step(*inputs)
    assert entered == [model]


@pytest.mark.parametrize(
    "runtime",
    [Runtime(), Runtime(engine="compiled"), Runtime(CUDA, activation_checkpointing=True)],
    ids=["on a CPU", "compiled on a CPU", "where blocks are computed again"],
)
def test_other_steps_are_as_they_were(runtime: Runtime, entered: list[nn.Module]) -> None:
    found, _, inputs = prepared(runtime)
    found.step(*inputs)
    assert entered == []


def test_a_step_trains_as_without(entered: list[nn.Module]) -> None:
    states = []
    for device in (torch.device("cpu"), CUDA):
        torch.manual_seed(0)
        found, model, inputs = prepared(Runtime(device))
        for _ in range(3):
            found.step(*inputs)
        states.append(dict(model.state_dict()))
    assert entered
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


def test_steps_that_differentiate_a_gradient_are_not_fused(entered: list[nn.Module]) -> None:
    found, _, inputs = prepared(Runtime(CUDA), compilable="a gradient is taken inside")
    found.step(*inputs)
    assert entered == []
