"""Sensitivities and per-sample gradient norms against their definitions and other implementations.

    pytest benchmarks/test_sensitivity_speed.py                 on the CPU
    pytest benchmarks/test_sensitivity_speed.py --device cuda

Closed forms: forward and backward in float32, logits [B, C] and features [B, D], or features and a weight
[C, D]. On CUDA also as replays of a captured graph, which leave out the launches. Floors: each array read
or written once in each direction; for the layer, its three matrix products.
Norms: those of all samples of a batch, against an ordinary forward and backward pass of the same batch,
torch.func, and BackPACK and Opacus where they are installed and know the network's layers.
`extra_info` as in measuring.record_row; memory is that of the gradient of logits or features alone. The
error is that of the worst gradient against float64, relative to its root mean square, or of the worst
sample's norm.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.measuring import captured, record_row, relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from dau_fast import models
from dau_fast.ops import attack_features, linear_sensitivity, per_sample_grad_norms, sensitivity
from dau_fast.ops.reference import attack_features_reference, sensitivity_reference


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("--smoke")
    cuda = metafunc.config.getoption("--device") == "cuda"
    if "closed" in metafunc.fixturenames:
        found = closed_cases(smoke, cuda)
        metafunc.parametrize("closed", found, ids=["-".join(map(str, case)) for case in found])
    if "network" in metafunc.fixturenames:
        metafunc.parametrize("network", ["tokens"] if smoke else list(NETWORKS))


# ---- closed forms


def linear_definition(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return sensitivity_reference(F.linear(features, weight, bias), features, targets)


# Ours, and the definition.
CLOSED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "sensitivity": (sensitivity, sensitivity_reference),
    "attack_features": (attack_features, attack_features_reference),
    "linear_sensitivity": (linear_sensitivity, linear_definition),
}
# (B, C, D); the second list on CUDA alone.
CLOSED_SIZES = {
    "sensitivity": ([(512, 10, 512), (128, 1000, 2048), (64, 50257, 768)], [(512, 131072, 64)]),
    "attack_features": ([(512, 10, 512), (64, 50257, 768)], []),
    "linear_sensitivity": ([(64, 50257, 256)], [(512, 131072, 1024)]),
}
CLOSED_ROWS = ["dau_fast", "definition", "definition compiled"]


def closed_cases(smoke: bool, cuda: bool) -> list[tuple[str, int, int, int]]:
    if smoke:
        return [(op, 4, 6, 5) for op in CLOSED]
    sizes = {op: both + more if cuda else both for op, (both, more) in CLOSED_SIZES.items()}
    return [(op, *size) for op, found in sizes.items() for size in found]


@cache
def closed_inputs(op: str, b: int, c: int, d: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """What is differentiated, targets, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    linear = op == "linear_sensitivity"
    shapes: list[tuple[int, ...]] = [(b, d), (c, d), (c,)] if linear else [(b, c), (b, d)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    if linear:
        inputs[1] /= d**0.5
    targets = torch.randint(c, (b,), generator=generator)
    # One number a result: from a plain sum a compiler would see that all of them are 1.
    shown = (b, c + 1) if op == "attack_features" else (b,)
    return inputs, targets, torch.randn(shown, generator=generator)


def closed_limits(op: str, b: int, c: int, d: int) -> dict[str, float]:
    """FLOPs, and bytes that must move."""
    if op == "linear_sensitivity":
        return {"flops": 6 * b * c * d, "moved": 4 * 3 * c * d}
    shown = 2 * b * c if op == "attack_features" else 0
    return {"moved": 4 * (3 * b * (c + d) + shown)}


@pytest.mark.parametrize("name", [*CLOSED_ROWS, *(f"{name} captured" for name in CLOSED_ROWS)])
def test_closed_form(
    benchmark: Any, device: torch.device, smoke: bool, name: str, closed: tuple[str, int, int, int]
) -> None:
    op, *size = closed
    if name.endswith("captured") and device.type != "cuda":
        pytest.skip("captured graphs need CUDA")
    inputs, targets, grad_shown = closed_inputs(op, *size)
    ours, definition = CLOSED[op]
    function = ours if name.startswith("dau_fast") else definition
    if "compiled" in name:
        torch.compiler.reset()
        function = torch.compile(function, backend="eager" if smoke else "inductor")

    def gradients(
        function: Callable[..., Tensor], kind: torch.dtype, count: int = len(inputs)
    ) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [x.to(device, kind).detach().requires_grad_(i < count) for i, x in enumerate(inputs)]
        labels, weights = targets.to(device), grad_shown.to(device, kind)
        return lambda: torch.autograd.grad(function(*leaves, labels), leaves[:count], weights)

    work = gradients(function, torch.float32)
    exact = gradients(definition, torch.float64)()
    error = max(relative_error(one, other) for one, other in zip(work(), exact, strict=True))
    del exact
    record_row(
        benchmark,
        captured(work) if name.endswith("captured") else work,
        device,
        case=f"{op} {'x'.join(map(str, size))}",
        implementation=name,
        # Of one gradient alone: a weight's own would hide what else is held.
        lean=gradients(function, torch.float32, count=1),
        gradient_bytes=4 * inputs[0].numel(),
        smoke=smoke,
        **closed_limits(op, *size),
    )
    benchmark.extra_info["error"] = error


# ---- norms of whole networks


class Tokens(nn.Module):
    """Embedding and Linear layers over positions: what Opacus has ghost norms for."""

    def __init__(self, words: int, width: int, depth: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, 10)

    def forward(self, index: Tensor) -> Tensor:
        x = self.words(index)
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.out(x.mean(1))


def group_norm_network() -> nn.Module:
    """The small network with GroupNorm, because Opacus takes no BatchNorm, and nothing changed in place."""
    network = models.build("small", 10, (3, 32, 32))
    for name, layer in list(network.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(layer, nn.BatchNorm2d):
            norm = nn.GroupNorm(8, layer.num_features)
            setattr(network.get_submodule(parent), own, norm)
        elif isinstance(layer, nn.ReLU):
            layer.inplace = False
    return network


def resnet18() -> nn.Module:
    return models.build("resnet18", 10, (3, 32, 32))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


# The network, a batch of inputs for it, and how many samples on the CPU and on CUDA.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int, int]] = {
    "resnet18": (resnet18, images, 32, 256),
    "small with GroupNorm": (group_norm_network, images, 64, 1024),
    "tokens": (lambda: Tokens(1000, 256, 4), lambda b: torch.randint(1000, (b, 128)), 32, 256),
}  # fmt: skip

Norms = Callable[[], Tensor]


def dau_fast(network: nn.Module, x: Tensor, y: Tensor) -> Norms:
    return lambda: per_sample_grad_norms(network, x, y)


def forward_and_backward(network: nn.Module, x: Tensor, y: Tensor) -> Norms:
    """No norms at all: what any training step costs."""
    parameters = list(network.parameters())

    def run() -> Tensor:
        losses = F.cross_entropy(network(x), y, reduction="none")
        torch.autograd.grad(losses.sum(), parameters)
        return losses

    return run


def torch_func(network: nn.Module, x: Tensor, y: Tensor, chunk_size: int | None = None) -> Norms:
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, parameters, (sample.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk_size)

    def run() -> Tensor:
        found = gradients(parameters, x, y)
        return torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0).sqrt()

    return run


def backpack(network: nn.Module, x: Tensor, y: Tensor) -> Norms:
    if any(isinstance(m, nn.GroupNorm | nn.Embedding) for m in network.modules()):
        pytest.skip("BackPACK does not know GroupNorm, nor an Embedding before a mean")
    package = installed("backpack")
    extended = package.extend(copy.deepcopy(network), use_converter=True).eval()
    loss_function = package.extend(nn.CrossEntropyLoss(reduction="sum"))
    wanted = importlib.import_module("backpack.extensions").BatchL2Grad

    def run() -> Tensor:
        extended.zero_grad()
        loss = loss_function(extended(x), y)
        with package.backpack(wanted()):
            loss.backward()
        return torch.stack([p.batch_l2 for p in extended.parameters()]).sum(0).sqrt()

    return run


def opacus(network: nn.Module, x: Tensor, y: Tensor) -> Norms:
    """Ghost clipping's first pass: ghost norms of Linear and Embedding, per-sample gradients of the rest."""
    if any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        pytest.skip("Opacus does not take BatchNorm")
    installed("opacus")
    module = importlib.import_module("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")
    wrapped = module.GradSampleModuleFastGradientClipping(
        copy.deepcopy(network).train(), max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
    )

    def run() -> Tensor:
        wrapped.zero_grad()
        F.cross_entropy(wrapped(x), y, reduction="sum").backward()
        norms: Tensor = wrapped.get_norm_sample()
        return norms

    return run


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}): pip install 'dau-fast[bench]'")


NORMS = {
    "dau_fast": dau_fast, "forward and backward": forward_and_backward, "vmap(grad)": torch_func,
    "BackPACK": backpack, "Opacus": opacus,
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms(benchmark: Any, device: torch.device, smoke: bool, name: str, network: str) -> None:
    build, samples, on_cpu, on_cuda = NETWORKS[network]
    batch = 2 if smoke else on_cuda if device.type == "cuda" else on_cpu
    torch.manual_seed(0)
    made, x = build().to(device).eval(), samples(batch).to(device)
    y = torch.randint(10, (batch,), device=device)
    work = NORMS[name](made, x, y)
    record_row(benchmark, work, device, case=f"norms of {network}, {batch}", implementation=name, smoke=smoke)
    if name != "forward and backward":
        exact = x.double() if x.is_floating_point() else x
        expected = torch_func(copy.deepcopy(made).double(), exact, y, chunk_size=16)()
        # Convolutions in TF32, as PyTorch takes them on CUDA, would be the error of all.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            benchmark.extra_info["error"] = ((work() - expected) / expected).abs().max().item()
