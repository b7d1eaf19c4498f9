"""Masked optimisers on the device chosen with --device; what is captured in CUDA graphs needs CUDA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dau_fast.optim import MaskedAdamW, MaskedSGD

Settings = dict[str, Any]
KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Settings]] = {
    "sgd": (MaskedSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (MaskedSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    return device


def network(device: torch.device, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 36, 4)
    return nn.Sequential(*layers).to(device)


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    named = model.named_parameters()
    return {n: (torch.rand(p.shape, generator=generator) < 0.3).to(p.device) for n, p in named if p.ndim > 1}


def tensors(model: nn.Module, optimizer: Any) -> list[Tensor]:
    states = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [*(p.detach() for p in model.parameters()), *states]


def assert_exactly_zero(model: nn.Module, optimizer: Any, masks: dict[str, Tensor]) -> None:
    for name, keep in masks.items():
        p = model.get_parameter(name)
        states = [value for value in optimizer.state[p].values() if value.shape == p.shape]
        for tensor in (p.detach(), *states):
            assert (tensor[~keep].view(torch.int32) == 0).all()
            assert (tensor[keep] != 0).any()


class Training:
    """A model, its optimiser with a learning rate on the device, and one batch."""

    def __init__(self, kind: str, device: torch.device, seed: int = 0) -> None:
        make, _, given = KINDS[kind]
        self.model = network(device, seed)
        self.masks = random_masks(self.model)
        self.lr = torch.tensor(0.01, device=device)
        self.optimizer = make(self.model.named_parameters(), self.masks, lr=self.lr, **given)
        self.x = torch.randn(6, 3, 8, 8, device=device)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.x).square().mean().backward()
        self.optimizer.step()

    def captured(self) -> torch.cuda.CUDAGraph:
        """A graph of one step, after three that are not captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph


@every_kind
def test_steps_equal_torch_and_masking_in_float64_on_the_cpu(device: torch.device, kind: str) -> None:
    make, usual, given = KINDS[kind]
    ours = network(device)
    masks = random_masks(ours)
    theirs = copy.deepcopy(ours).double().cpu()
    optimizer = make(ours.named_parameters(), masks, lr=0.01, **given)
    expected = usual(theirs.parameters(), lr=0.01, **given)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))

    def mask() -> None:
        with torch.no_grad():
            for name, keep in masks.items():
                theirs.get_parameter(name).mul_(keep.cpu())

    mask()
    for step in range(20):
        for one, other in pairs:
            other.grad = (3 * other.detach() + step).cos()
            one.grad = other.grad.float().to(device)
        optimizer.step()
        expected.step()
        mask()
    for one, other in pairs:
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-4, atol=1e-5)
    assert_exactly_zero(ours, optimizer, masks)


def test_adamw_takes_over_torchs_steps_which_are_on_the_cpu(device: torch.device) -> None:
    model = network(device)
    usual = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    usual.step()
    ours = MaskedAdamW(model.named_parameters(), random_masks(model))
    ours.load_state_dict(usual.state_dict())
    assert {state["step"].device.type for state in ours.state.values()} == {device.type}
    ours.step()
    assert {state["step"].item() for state in ours.state.values()} == {2}


# ---- CUDA graphs


@every_kind
def test_replays_equal_eager_steps_and_follow_the_learning_rate(cuda: torch.device, kind: str) -> None:
    one, other = (Training(kind, cuda) for _ in range(2))
    other.x = one.x
    graph = one.captured()
    for _ in range(3):
        other.step()
    for rate in (0.01, 0.02, 0.0, 0.005):
        for training in (one, other):
            training.lr.fill_(rate)
        before = [p.detach().clone() for p in one.model.parameters()]
        graph.replay()
        other.step()
        moved = any(not torch.equal(p, old) for p, old in zip(one.model.parameters(), before, strict=True))
        assert moved == (rate != 0)
        states = zip(tensors(one.model, one.optimizer), tensors(other.model, other.optimizer), strict=True)
        for mine, theirs in states:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert_exactly_zero(one.model, one.optimizer, one.masks)


@every_kind
def test_a_graph_outlives_whatever_else_is_stepped(cuda: torch.device, kind: str) -> None:
    """More tables than any cache holds, and memory of the same sizes that others have used since."""
    one, other = (Training(kind, cuda) for _ in range(2))
    other.x = one.x
    graph = one.captured()
    for _ in range(3):
        other.step()
    for seed in range(80):
        third = Training(kind, cuda, seed)
        third.step()
        junk = [torch.full((300,), -1, dtype=torch.int64, device=cuda) for _ in range(20)]
        del third, junk
    for _ in range(3):
        graph.replay()
        other.step()
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_eager_steps_go_on_after_a_capture(cuda: torch.device) -> None:
    """Gradients of the eager steps and of the graph lie at different addresses."""
    one, other = (Training("sgd", cuda) for _ in range(2))
    other.x = one.x
    graph = one.captured()
    for _ in range(3):
        other.step()
    for replay in (True, False, True, True, False):
        (graph.replay if replay else one.step)()
        other.step()
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@every_kind
def test_a_first_step_in_a_capture_is_refused(cuda: torch.device, kind: str) -> None:
    training = Training(kind, cuda)
    training.model(training.x).square().mean().backward()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"call step\(\) once before the capture"), torch.cuda.graph(graph):
        training.optimizer.step()


def test_a_learning_rate_on_the_cpu_is_refused_in_a_capture(cuda: torch.device) -> None:
    training = Training("sgd", cuda)
    training.step()
    training.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"lr is a tensor on cpu"), torch.cuda.graph(graph):
        training.optimizer.step()
