"""Networks of transformers and timm, and data sets of datasets, where these are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calling import call, succeed
from torch import Tensor, nn

from dau_fast.api import unlearn
from dau_fast.errors import UserError
from dau_fast.models import build, find_normalisation

# Importing these libraries takes seconds.
pytestmark = pytest.mark.slow

SHORT = {"turns": 4, "batch_size": 8, "warmup_steps": 2}
SETS = {"forget": 10, "retain": 40, "validation": 20, "test": 20}


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (count, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "num_labels": 3,
    }  # fmt: skip
    image = {"image_size": 8, "patch_size": 4, "num_channels": 3}
    configs = {
        "ViT": lambda: transformers.ViTConfig(**small, **image),
        "DeiT": lambda: transformers.DeiTConfig(**small, **image),
        "Bert": lambda: transformers.BertConfig(**small, vocab_size=60),
        "DistilBert": lambda: transformers.DistilBertConfig(
            vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3
        ),
        "Roberta": lambda: transformers.RobertaConfig(**small, vocab_size=60, max_position_embeddings=30),
        "ConvNext": lambda: transformers.ConvNextConfig(
            hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=3, patch_size=2
        ),
    }
    kind = "SequenceClassification" if name in ("Bert", "DistilBert", "Roberta") else "ImageClassification"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: nn.Module = getattr(transformers, f"{name}For{kind}")(configs[name]())
        return made.eval()


@pytest.mark.parametrize("form", ["columns", "data set"])
@pytest.mark.parametrize("name", ["ViT", "DeiT", "ConvNext", "Bert", "DistilBert", "Roberta"])
def test_a_classifier_of_transformers_takes_its_inputs_by_name(name: str, form: str) -> None:
    network = hugging_face(name)
    sets: dict[str, Any] = {}
    for seed, (part, count) in enumerate(SETS.items()):
        texts = name in ("Bert", "DistilBert", "Roberta")
        size = 32 if name == "ConvNext" else 8
        columns = tokens(count, seed) if texts else {"pixel_values": draw((count, 3, size, size), seed)}
        labels = torch.arange(count) % 3
        sets[part] = columns, labels
        if form == "data set":
            datasets = pytest.importorskip("datasets")
            kept = {key: tensor.numpy() for key, tensor in columns.items()}
            rows = datasets.Dataset.from_dict(kept | {"labels": labels.numpy(), "idx": list(range(count))})
            sets[part] = rows.with_format("torch") if part != "retain" else rows
    result = unlearn(network, **sets, config=SHORT, device="cpu")
    assert type(result.model) is type(network)
    assert result.after is not None
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    changed = [module for module in result.model.modules() if isinstance(module, nn.Linear)][-1]
    assert not torch.equal(head.weight, changed.weight)


def test_rows_of_datasets_are_asked_for_by_their_ids() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {
            "x": draw((40, 6), 0).numpy(),
            "label": [i % 3 for i in range(40)],
            "id": [f"p{i}" for i in range(40)],
        }
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    result = unlearn(Net(), train=rows, forget=["p7", "p3"], config=SHORT, device="cpu")
    assert result.forgotten == ((3, 7),)


TIMM = ["vit_tiny_patch16_224", "resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_goes_in_as_it_is(name: str) -> None:
    timm = pytest.importorskip("timm")
    small: dict[str, Any] = {"img_size": 32} if "224" in name else {}
    if name.startswith("vit"):
        small |= {"patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    if name.startswith("swin"):
        small |= {"window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    network = timm.create_model(name, num_classes=3, **small).eval()
    sets = {
        part: (draw((count // 2, 3, 32, 32), seed), torch.arange(count // 2) % 3)
        for seed, (part, count) in enumerate(SETS.items())
    }
    result = unlearn(network, **sets, config={**SHORT, "turns": 2, "batch_size": 4}, device="cpu")
    assert result.after is not None


@pytest.mark.parametrize("name", ["resnet10t", "deit_tiny_patch16_224", "mixer_s32_224"])
def test_a_network_of_timm_is_an_architecture_whatever_the_size_of_images(name: str) -> None:
    pytest.importorskip("timm")
    network = build(f"timm:{name}", 5, (1, 32, 32))
    assert network.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_an_architecture_of_timm_brings_its_normalisation(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    assert find_normalisation("timm:vit_tiny_patch16_224") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for arch, told in (("small", "for architectures of timm, not for `arch=small`"),
                       ("timm:nothing", "does not say what `arch=timm:nothing`")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            find_normalisation(arch)
    given = ("--dataset", "folder", "--data", pictures, "--image-size", 32, "--arch", "timm:resnet10t",
             "--forget", "class:red", "--methods", "ga", "--epochs", 1, "--mean", "timm")  # fmt: skip
    report = succeed(tmp_path / "out", *given).report
    assert report["run"]["normalisation"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert "stands for both" in call(tmp_path / "other", *given, "--std", "0.2").stderr
