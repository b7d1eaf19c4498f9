"""A network counted as by hand."""

from __future__ import annotations

import torch
from torch import nn

from dau_fast.cost import count_network, has_batchnorm
from dau_fast.models import Classifier


def test_a_network_is_counted_as_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model = Classifier(nn.Sequential(*network, nn.Linear(4 * 8 * 8, 5)))
    found = count_network(model.eval(), torch.zeros(6, 3, 8, 8))
    assert not any(module.training for module in model.modules())
    assert found.flops == 2 * (8 * 8 * 4 * 3 * 9 + 4 * 8 * 8 * 5)
    assert found.parameters == 4 * 3 * 9 + 4 + 8 + 4 * 8 * 8 * 5 + 5
    assert (found.features, found.classes, found.norms, found.channels) == (256, 5, 1, 4)
    assert found.normed == 4 * 8 * 8
    # Images, and what goes into the norm and comes out of the ReLU, which the last layer keeps too.
    assert found.activations == 4 * 8 * 8 * (3 + 4 + 4)
    assert found.largest == 4 * 4 * 8 * 8


def test_only_norms_with_running_statistics_take_a_pass() -> None:
    assert has_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    assert not has_batchnorm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3)))
