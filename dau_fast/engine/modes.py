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
def batchnorm_momentum(norms: Sequence[_BatchNorm], momentum: float | None) -> Iterator[None]:
    """`norms` track statistics with `momentum`, None for the plain mean, and then with their own again."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.momentum = value


def find_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of `model`, each once."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
