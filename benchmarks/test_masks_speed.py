"""Masks and masked optimiser steps against what PyTorch offers, over all weights of a ResNet-18 at once.

    pytest benchmarks/test_masks_speed.py                 on the CPU
    pytest benchmarks/test_masks_speed.py --device cuda

95 % of the weights of convolutions and of the linear layer are masked at random. Floors, in bytes a weight:
apply 8 and step 20 (gradient read; weight and momentum read and written) and an eighth for the mask.
`extra_info` as in measuring.record_row; `least_bytes` counts only cache lines that keep a weight, which
memory that fetches lines in pairs and in stretches does not reach at this sparsity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.measuring import captured, record_row
from torch import Tensor, nn
from torch.nn.utils import prune

from dau_fast import models
from dau_fast.ops import apply_masks_, pack_mask
from dau_fast.optim import MaskedAdamW, MaskedSGD

SPARSITY = 0.95
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


class Pruned:
    """A network, its masks by parameter name, and gradients that stay the same."""

    def __init__(self, smoke: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.toy = smoke
        self.arch = "small" if smoke else "resnet18"
        self.network = models.build(self.arch, 10, (3, 32, 32)).to(device)
        named = dict(self.network.named_parameters())
        self.masks = {
            name: torch.rand(p.shape, device=device) >= SPARSITY for name, p in named.items() if p.ndim > 1
        }
        for parameter in named.values():
            parameter.grad = torch.randn_like(parameter)
        self.weights = [named[name].detach() for name in self.masks]
        self.floats = [mask.float() for mask in self.masks.values()]
        self.count = sum(p.numel() for p in named.values())
        self.masked_count = sum(w.numel() for w in self.weights)

    def lines(self) -> int:
        """Weights in cache lines of 16 that keep one, and those without a mask."""
        padded = (nn.functional.pad(m.flatten(), (0, -m.numel() % 16)) for m in self.masks.values())
        kept = sum(int(m.view(-1, 16).any(1).sum()) for m in padded)
        return 16 * kept + self.count - self.masked_count


@pytest.fixture
def pruned(smoke: bool, device: torch.device) -> Pruned:
    return Pruned(smoke, device)


def case(what: str, pruned: Pruned) -> str:
    return f"{what}, {pruned.arch} at {100 * SPARSITY:.0f} %"


# ---- apply


def packed_masks(pruned: Pruned) -> Callable[[], None]:
    packed = [pack_mask(mask) for mask in pruned.masks.values()]
    return lambda: apply_masks_(pruned.weights, packed)


def foreach_multiplication(pruned: Pruned) -> Callable[[], None]:
    return lambda: torch._foreach_mul_(pruned.weights, pruned.floats)


def copy_of_as_much(pruned: Pruned) -> Callable[[], object]:
    """A plain copy of as many floats, the yardstick."""
    source = torch.cat([w.flatten() for w in pruned.weights])
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


APPLY = {
    "dau_fast": packed_masks, "foreach multiplication": foreach_multiplication, "copy": copy_of_as_much,
}  # fmt: skip


@pytest.mark.parametrize("name", APPLY)
def test_apply(benchmark: Any, device: torch.device, smoke: bool, name: str, pruned: Pruned) -> None:
    record_row(
        benchmark, APPLY[name](pruned), device, case=case("apply", pruned), implementation=name,
        moved=pruned.masked_count * (8 + (1 / 8 if name != "copy" else 0)), smoke=smoke,
    )  # fmt: skip


# ---- the step


def then_masked(pruned: Pruned, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def run() -> None:
        optimizer.step()
        torch._foreach_mul_(pruned.weights, pruned.floats)

    return run


def sgd_foreach(pruned: Pruned) -> Callable[[], None]:
    return then_masked(pruned, torch.optim.SGD(pruned.network.parameters(), foreach=True, **SETTINGS))


def sgd_fused(pruned: Pruned) -> Callable[[], None]:
    return then_masked(pruned, torch.optim.SGD(pruned.network.parameters(), fused=True, **SETTINGS))


def sgd_compiled(pruned: Pruned) -> Callable[[], None]:
    torch.compiler.reset()
    # At toy size nothing but that it runs is of interest, and Inductor takes a minute.
    return torch.compile(sgd_foreach(pruned), backend="eager" if pruned.toy else "inductor")


def asp(pruned: Pruned, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """As apex.contrib.sparsity.ASP does: a loop over gradients before the step, one over weights after it."""
    sparse = [(pruned.network.get_parameter(name), mask) for name, mask in pruned.masks.items()]

    @torch.no_grad()
    def run() -> None:
        for parameter, mask in sparse:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        optimizer.step()
        for parameter, mask in sparse:
            parameter.mul_(mask)

    return run


def sgd_asp(pruned: Pruned) -> Callable[[], None]:
    # Without foreach=..., as a user of ASP would have it: torch chooses.
    return asp(pruned, torch.optim.SGD(pruned.network.parameters(), **SETTINGS))


def adamw_asp(pruned: Pruned) -> Callable[[], None]:
    return asp(pruned, torch.optim.AdamW(pruned.network.parameters()))


def sgd_hooks(pruned: Pruned) -> Callable[[], None]:
    """The step, and what torch.nn.utils.prune adds to both passes: weight times mask, gradient times mask."""
    optimizer = torch.optim.SGD(pruned.network.parameters(), **SETTINGS)
    weights = [pruned.network.get_parameter(name) for name in pruned.masks]
    grads = [torch.randn_like(weight) for weight in weights]

    def run() -> None:
        masked = [weight * mask for weight, mask in zip(weights, pruned.floats, strict=True)]
        for weight in weights:
            weight.grad = None
        torch.autograd.backward(masked, grads)
        optimizer.step()

    return run


def masked_sgd(pruned: Pruned) -> Callable[[], None]:
    return MaskedSGD(pruned.network.named_parameters(), pruned.masks, **SETTINGS).step


def masked_adamw(pruned: Pruned) -> Callable[[], None]:
    return MaskedAdamW(pruned.network.named_parameters(), pruned.masks).step


def adamw_foreach(pruned: Pruned) -> Callable[[], None]:
    return then_masked(pruned, torch.optim.AdamW(pruned.network.parameters(), foreach=True))


def adamw_fused(pruned: Pruned) -> Callable[[], None]:
    return then_masked(pruned, torch.optim.AdamW(pruned.network.parameters(), fused=True))


# Bytes a weight that must move, and who moves them.
STEPS: dict[str, tuple[float, dict[str, Callable[[Pruned], Callable[[], None]]]]] = {
    "SGD": (20, {
        "dau_fast": masked_sgd, "foreach and foreach mask": sgd_foreach, "fused and foreach mask": sgd_fused,
        "ASP": sgd_asp, "torch.nn.utils.prune": sgd_hooks, "compiled": sgd_compiled,
    }),
    "AdamW": (28, {
        "dau_fast": masked_adamw, "foreach and foreach mask": adamw_foreach,
        "fused and foreach mask": adamw_fused, "ASP": adamw_asp,
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, rows) in STEPS.items() for name in rows]
)
def test_step(
    benchmark: Any, device: torch.device, smoke: bool, kind: str, name: str, pruned: Pruned
) -> None:
    size, rows = STEPS[kind]
    record_row(
        benchmark, rows[name](pruned), device, case=case(f"{kind} step", pruned), implementation=name,
        moved=pruned.count * size + pruned.masked_count / 8, smoke=smoke,
    )  # fmt: skip
    benchmark.extra_info["least_bytes"] = pruned.lines() * size + pruned.masked_count / 8


@pytest.mark.parametrize("name", ["dau_fast", "fused and foreach mask"])
def test_captured_step(benchmark: Any, device: torch.device, smoke: bool, name: str, pruned: Pruned) -> None:
    """The same as CUDA graphs: what is left without Python."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    size, rows = STEPS["SGD"]
    record_row(
        benchmark, captured(rows[name](pruned)), device, case=case("SGD step", pruned),
        implementation=f"{name} captured", moved=pruned.count * size + pruned.masked_count / 8, smoke=smoke,
    )  # fmt: skip


# ---- forward: what the hooks of torch.nn.utils.prune add to a pass over one image


@pytest.mark.parametrize("name", ["dau_fast", "torch.nn.utils.prune"])
def test_forward(benchmark: Any, device: torch.device, smoke: bool, name: str, pruned: Pruned) -> None:
    network, x = copy.deepcopy(pruned.network).eval(), torch.randn(1, 3, 32, 32, device=device)
    weights: dict[str, Tensor] = {key: network.get_parameter(key) for key in pruned.masks}
    apply_masks_(list(weights.values()), list(pruned.masks.values()))
    if name != "dau_fast":
        for key, mask in pruned.masks.items():
            prune.custom_from_mask(network.get_submodule(key.rpartition(".")[0]), "weight", mask)

    @torch.no_grad()
    def work() -> Tensor:
        return network(x)

    record_row(benchmark, work, device, case=case("forward", pruned), implementation=name, smoke=smoke)
