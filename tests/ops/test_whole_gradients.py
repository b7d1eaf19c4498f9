"""Per-sample gradient norms of layers without a rule: a pass of the whole model, together or one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_norms import CLASSES, batch_for, one_by_one
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer, convnext, swin_transformer

from dau_fast.ops import _whole_gradients, per_sample_grad_norms

per_sample_module = sys.modules["dau_fast.ops.per_sample_grad_norms"]


def test_unknown_layers_take_a_pass_of_their_own_or_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, CLASSES)).double()
    x, y = batch_for((4,))
    per_sample_module._tell_of_apart.cache_clear()
    for _ in range(2):
        torch.testing.assert_close(per_sample_grad_norms(model, x, y), one_by_one(model, x, y))
    assert [line for line in caplog.messages if "gradients of PReLU take a pass" in line] == caplog.messages
    assert len(caplog.messages) == 1
    parts = per_sample_grad_norms(model, x, y, per_layer=True)
    assert set(parts) == {"0", "1", "2"}
    norms = per_sample_grad_norms(model, x, y, strict=False)
    assert "leave out 1 (PReLU)" in caplog.text
    torch.testing.assert_close(norms.square() + parts["1"].square(), one_by_one(model, x, y).square())


class SameLinear(nn.Linear):
    """Computes what its parent does."""

    def __init__(self, d: int, p: int) -> None:
        super().__init__(d, p)
        self.name = "same"


class DoubledLinear(nn.Linear):
    """Computes something else by its parent's parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class OtherConvolution(nn.Conv1d):
    """Keeps its parent's forward, which calls what is another here."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.square(), bias)


class Sequence(nn.Module):
    """A layer on sequences [B, T, D] before the last position's classifier."""

    def __init__(self, layer: nn.Module, read: Callable[[nn.Module, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.layer, self.read, self.out = layer, read, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.read(self.layer, x)[:, -1])


class Rearranged(nn.Module):
    """Linear layers on windows [B W, D] and on sequences [T, B, D]; one of them is called both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.windows, self.first, self.both = nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(5, 5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.windows(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2])  # [B, W, 3]
        x = self.both(self.first(x.transpose(0, 1)).tanh()).mean(0)  # [B, 5]
        return self.out(self.both(x).tanh())


STRANGERS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "same": lambda: (nn.Sequential(SameLinear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (4,)),
    "doubled": lambda: (nn.Sequential(DoubledLinear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (4,)),
    "convolution": lambda: (
        nn.Sequential(OtherConvolution(2, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES)), (2, 6),
    ),
    "parametrized": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, CLASSES)), (4,),
    ),
    "rearranged": lambda: (Rearranged(), (6, 2)),
    "attention": lambda: (
        Sequence(nn.MultiheadAttention(8, 2, batch_first=True), lambda layer, x: layer(x, x, x)[0]), (5, 8),
    ),
    "transformer": lambda: (
        Sequence(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda layer, x: layer(x)), (5, 8),
    ),
    "lstm": lambda: (Sequence(nn.LSTM(4, 8, batch_first=True), lambda layer, x: layer(x)[0]), (5, 4)),
    "convnext": lambda: (
        nn.Sequential(convnext.LayerNorm2d(4, eps=1e-6), convnext.CNBlock(4, 1.0, 0.0), nn.Flatten(),
                      nn.Linear(144, CLASSES)), (4, 6, 6),
    ),
    "swin": lambda: (
        nn.Sequential(swin_transformer.SwinTransformerBlock(8, 2, [2, 2], [0, 0]), nn.Flatten(),
                      nn.Linear(128, CLASSES)), (4, 4, 8),
    ),
    "vit": lambda: (VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=CLASSES), (3, 8, 8)),
}  # fmt: skip


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", STRANGERS)
def test_layers_without_a_rule_have_exact_norms_too(name: str) -> None:
    torch.manual_seed(0)
    model, shape = STRANGERS[name]()
    model = model.double().eval()
    for parameter in model.parameters():  # ViT's head begins at zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x, y = batch_for(shape)
    torch.testing.assert_close(per_sample_grad_norms(model, x, y), one_by_one(model, x, y))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_vmap_cannot_take_is_taken_sample_by_sample(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(_whole_gradients, "vmap", refuse)
    _whole_gradients._say_once.cache_clear()
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, CLASSES)).double()
    x, y = batch_for((4,))
    torch.testing.assert_close(per_sample_grad_norms(model, x, y), one_by_one(model, x, y))
    assert "vmap cannot take this model: no batching rule" in caplog.text


def test_chance_is_refused_where_a_layer_takes_a_pass_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Dropout(0.5), nn.Linear(4, CLASSES)).double()
    x, y = batch_for((4,))
    with pytest.raises(ValueError, match=r"2 \(Dropout\) draws at random"):
        per_sample_grad_norms(model, x, y)
    per_sample_grad_norms(model.eval(), x, y)
