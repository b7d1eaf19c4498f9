"""Few images, and networks without BatchNorm: whatever is asked for, the model stays one that can be used."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.api import Result, unlearn
from dau_fast.errors import UserError

# Images a set: training, validation, test.
SIZES = (800, 300, 500)


@cache
def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[
        order
    ]


def cnn(norm: bool) -> nn.Module:
    def block(channels: int, out: int) -> list[nn.Module]:
        middle: list[nn.Module] = [nn.BatchNorm2d(out)] if norm else []
        return [nn.Conv2d(channels, out, 3, padding=1), *middle, nn.ReLU()]

    layers = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, num_labels=10,
    )  # fmt: skip
    network: nn.Module = transformers.ViTForImageClassification(config)
    return network


def timm() -> nn.Module:
    network: nn.Module = pytest.importorskip("timm.models.vision_transformer").VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2
    )
    return network


def transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    network = VisionTransformer(8, 2, 2, 2, 32, 64, num_classes=10)
    network.conv_proj = nn.Conv2d(1, 32, 2, 2)
    nn.init.normal_(network.heads[0].weight, std=0.02)
    return network


NETWORKS = {
    "cnn with BatchNorm": lambda: cnn(True), "cnn": lambda: cnn(False), "transformer": transformer,
    "Hugging Face ViT": hugging_face, "timm ViT": timm,
}  # fmt: skip
CNNS = ("cnn with BatchNorm", "cnn")


@cache
def trained(name: str) -> nn.Module:
    """The network `name`, trained on the training images until it knows nearly all of them."""
    images, labels = (tensor[: SIZES[0]] for tensor in digits())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name]()
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in range(12 if name in CNNS else 40):
            for batch in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                told = network(images[batch])
                F.cross_entropy(getattr(told, "logits", told), labels[batch]).backward()
                optimizer.step()
    return network.eval()


def forgotten(name: str, asked: list[int], seed: int = 0) -> Result:
    images, labels = digits()
    count = sum(SIZES)
    parts = zip(images[:count].split(SIZES), labels[:count].split(SIZES), strict=True)
    train, validation, test = parts
    sets = {"train": train, "validation": validation, "test": test}
    return unlearn(trained(name), **sets, forget=asked, seed=seed, device="cpu")


def kept_or_told(before: float, after: float, log: pytest.LogCaptureFixture) -> bool:
    """Whether no more than a point of accuracy is gone, or a line says how much."""
    said = f"right on {before:.1f} % of the retain set, and now is on {after:.1f} %"
    return after > before - 1 or said in log.text


# Of one image, on 497 test images: two points of accuracy are ten of them.
DEAR = {("cnn with BatchNorm", 1)}
TOO_DEAR = pytest.mark.xfail(reason="the game costs two points of test accuracy", strict=False)


def cases() -> list[object]:
    found = []
    for name in NETWORKS:
        for count in (1, 2, 3, 5):
            quick = name in CNNS and count in (1, 5)
            marks = [] if quick else [pytest.mark.slow]
            marks += [TOO_DEAR] if (name, count) in DEAR else []
            found.append(pytest.param(name, count, marks=marks))
    return found


@pytest.mark.parametrize(("name", "count"), cases())
def test_a_few_images_cost_the_others_nothing(name: str, count: int) -> None:
    result = forgotten(name, list(range(100, 100 + count)))
    before, after = result.retain_accuracy
    assert after > before - 1
    assert result.before is not None
    assert result.after is not None
    assert (result.before.ra, result.after.ra) == (before, after)
    assert result.after.ta > result.before.ta - 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["cnn", "transformer", "Hugging Face ViT", "timm ViT"])
def test_a_network_without_batchnorm_is_not_ruined_or_nothing_comes_of_it(
    name: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        result = forgotten(name, list(range(80)), seed)
    except UserError as error:
        assert "every game ruined the model" in str(error)  # noqa: PT017
        return
    assert kept_or_told(*result.retain_accuracy, caplog)
    # A point and two standard errors, which is what a game may cost.
    assert result.retain_accuracy[1] > result.retain_accuracy[0] - 2.5
    assert result.validation_accuracy[1] > result.validation_accuracy[0] - 5
