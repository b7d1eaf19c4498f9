"""Changing how a model's layers behave for a while, and back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Every module of `model` in evaluation mode, and back to the mode that it had."""
    return _in_mode(model, training=False)


def training(model: nn.Module) -> AbstractContextManager[None]:
    """Every module of `model` in training mode, and back to the mode that it had."""
    return _in_mode(model, training=True)


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def batchnorm_momentum(norms: Sequence[_BatchNorm], momentum: float) -> Iterator[None]:
    """`norms` track statistics with `momentum`, and then with their own again."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.momentum = value


@contextmanager
def plain_means(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """`norms` track the plain mean over the batches inside, and then with their own momentum again.

    PyTorch does so for a momentum of None, but asks the device at every call how many batches there were.
    """
    before, calls = [norm.momentum for norm in norms], dict.fromkeys(norms, 0)

    def count(norm: nn.Module, _: object) -> None:
        assert isinstance(norm, _BatchNorm)
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]

    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    try:
        yield
    finally:
        for norm, value, hook in zip(norms, before, hooks, strict=True):
            hook.remove()
            norm.momentum = value


def find_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of `model`, each once."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
