"""A caller's own networks and data, of many kinds, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

SETS = {"forget": 10, "retain": 40, "validation": 20, "test": 20}
CLASSES = 3
SHORT = {"turns": 4, "batch_size": 8, "warmup_steps": 2}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


# ---- networks


class HeadOutputs(NamedTuple):
    """As torchvision's networks with a second head answer in training."""

    logits: Tensor
    aux: Tensor


@dataclass
class Answer:
    """As Hugging Face's outputs are."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class Net(nn.Module):
    """A body, a Linear head, and whatever is made of its logits."""

    def __init__(self, body: nn.Module, features: int, told: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.body, self.head, self.told = body, nn.Linear(features, CLASSES), told

    def forward(self, x: Tensor) -> Any:
        return self.told(self.head(self.body(x)))


class Two(Net):
    """Takes a second input, and forgets it."""

    def forward(self, x: Tensor, told: Tensor | None = None) -> Any:
        return super().forward(x)


class Reader(nn.Module):
    """Tokens through an embedding, and something that reads along."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.kind = kind
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embedding(input_ids)
        if self.kind == "lstm":
            x = self.lstm(x)[0]
        if self.kind == "transformer":
            x = self.encoder(x, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        if attention_mask is None:
            return self.classifier(x.mean(1))
        weights = attention_mask[..., None].to(x)
        return Answer(self.classifier((x * weights).sum(1) / weights.sum(1).clamp_min(1)))


class Vision(nn.Module):
    """Takes pixels by name and answers with an object."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Answer:
        assert labels is None
        x = self.encoder(self.patches(pixel_values).flatten(2).transpose(1, 2))
        return Answer(self.classifier(x.mean(1)), (x,))


def mlp(norm: bool) -> nn.Module:
    middle: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.ReLU(), nn.Linear(16, CLASSES))


def cnn(norm: nn.Module) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net(body, 8)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=CLASSES)


def torchvision_net(name: str) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=CLASSES)


ROWS, IMAGES, TOKENS = (6,), (3, 8, 8), (7,)
# Of each network what it is given.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp with BatchNorm": (lambda: mlp(True), ROWS),
    "mlp": (lambda: mlp(False), ROWS),
    "logistic regression": (lambda: nn.Linear(6, CLASSES), ROWS),
    "cnn with BatchNorm": (lambda: cnn(nn.BatchNorm2d(8)), IMAGES),
    "cnn with GroupNorm": (lambda: cnn(nn.GroupNorm(2, 8)), IMAGES),
    "cnn": (lambda: cnn(nn.Identity()), IMAGES),
    "torchvision ViT": (torchvision_vit, IMAGES),
    "torchvision ShuffleNet": (lambda: torchvision_net("shufflenet_v2_x0_5"), (3, 32, 32)),
    "tuple": (lambda: Net(nn.Linear(6, 8), 8, lambda y: (y, y.detach().sum())), ROWS),
    "dict": (lambda: Net(nn.Linear(6, 8), 8, lambda y: {"loss": None, "logits": y}), ROWS),
    "named tuple": (lambda: Net(nn.Linear(6, 8), 8, lambda y: HeadOutputs(y, y[:, :1])), ROWS),
    "object": (lambda: Net(nn.Linear(6, 8), 8, Answer), ROWS),
    "embedding": (lambda: Reader("mean"), TOKENS),
    "lstm": (lambda: Reader("lstm"), TOKENS),
    "text transformer": (lambda: Reader("transformer"), TOKENS),
    "named pixels": (Vision, IMAGES),
}


def inputs(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    if shape == TOKENS:
        return torch.randint(50, (count, *shape), generator=torch.Generator().manual_seed(seed))
    return draw((count, *shape), seed)


def make_sets(shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        name: (inputs(count, shape, seed), labels(count)) for seed, (name, count) in enumerate(SETS.items())
    }


# ---- sets


class Pairs(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


class Dicts(Pairs):
    """Items as Hugging Face's data sets have them, with what no network takes."""

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i].tolist(), "label": int(self.y[i]), "file": f"{i}.png"}


def collate(rows: list[Any]) -> dict[str, Tensor]:
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate("xy")}


def whole() -> tuple[Tensor, Tensor]:
    return inputs(60, ROWS, 9), labels(60)
