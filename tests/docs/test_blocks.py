"""Every code block of the pages for own models, data and methods runs as it stands, one after the other."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import run
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.data.requests import read_request
from dau_fast.methods import plugins
from dau_fast.metrics import plugins as attack_plugins
from dau_fast.prune import plugins as prune_plugins

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("own-model.md", "own-data.md", "own-method.md")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class Net(nn.Module):
    """A small network whose forward pass calls its input x, with two heads."""

    def __init__(self, heads: tuple[str, ...] = ("head",)) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.heads = heads
        for name in heads:
            setattr(self, name, nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.norm(self.conv1(x))).mean((2, 3))
        told = [getattr(self, name)(features) for name in self.heads]
        return told[0] if len(told) == 1 else tuple(told)


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return noise + 2 * torch.eye(3)[labels][:, :, None, None], labels


def train(model: nn.Module, loader: Any, epochs: int = 8) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(epochs):
        for x, y in loader:
            told = model(x)
            answers = told if isinstance(told, tuple) else (told,)
            optimizer.zero_grad()
            sum(F.cross_entropy(answer, y) for answer in answers).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture
def names() -> dict[str, Any]:
    """What the pages take for granted."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (x, y), (x_v, y_v), (x_t, y_t) = images(120, 1), images(60, 2), images(60, 3)
        batches = list(zip(x.split(20), y.split(20), strict=True))
        model, two = train(Net(), batches), train(Net(("shape", "colour")), batches)

    def train_again(loader: Any) -> nn.Module:
        return train(Net(), loader)

    logged: list[Any] = []
    return {
        "model": model, "two_heads": two, "x": x, "y": y, "x_v": x_v, "y_v": y_v, "x_t": x_t, "y_t": y_t,
        "train_again": train_again, "log": lambda *told: logged.append(told), "logged": logged,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_ROWS", {})
    monkeypatch.setattr(plugins, "_FUNCTIONS", {})


def execute(page: str, names: dict[str, Any]) -> None:
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)


def test_every_block_is_of_a_language_that_is_run() -> None:
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) <= {"python", "sh", "toml", "text", ""}
        assert text.count("```") == 2 * sum(
            len(blocks(page, kind)) for kind in ("python", "sh", "toml", "text")
        )


def test_own_model(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    execute("own-model.md", names)
    assert (tmp_path / "out" / "report.html").exists()
    assert names["second"].forgotten == ((3, 17, 41), (5, 80))
    assert names["logged"]
    assert "dau: 32 of" in capsys.readouterr().out
    assert names["masks"].sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
def test_own_method(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for room in (prune_plugins, attack_plugins):
        monkeypatch.setattr(room, "_ROWS", {})
    execute("own-method.md", names)
    assert names["result"].method == "shrink"
    plugins._ROWS.clear()
    prune_plugins._ROWS.clear()
    attack_plugins._ROWS.clear()
    shrink, _, others = blocks("own-method.md", "python")
    (tmp_path / "mine.py").write_text(f"{shrink}\n{others}")
    told = run_all(blocks("own-method.md", "sh"), ("--epochs", 1, "--device", "cpu"))
    assert "Shrunk" in told[0]
    assert all("top margin" in shown for shown in told)
    (toml,) = blocks("own-method.md", "toml")
    assert list(tomllib.loads(toml)["project"]["entry-points"]) == [plugins.ENTRY_POINTS]


def run_all(scripts: list[str], more: tuple[object, ...] = ()) -> list[str]:
    """What each command of `scripts` printed; further arguments go to those that unlearn."""
    printed = []
    for line in "\n".join(scripts).replace("\\\n", " ").splitlines():
        if not line:
            continue
        program, *arguments = shlex.split(line)
        assert program == "dau_fast"
        unlearns = arguments[0].startswith("--")
        code, shown, told = run(*arguments, *(more if unlearns else ()))
        assert code == 0, told
        printed.append(shown)
    return printed


@pytest.mark.slow
def test_own_data(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    requests = blocks("own-data.md", "text")[1]
    (tmp_path / "requests.csv").write_text(requests)
    (tmp_path / "second.txt").write_text("train/dog/0003.jpg\n")
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 6), ("test", 6)):
        for channel, name in enumerate(("bird", "cat", "dog")):
            folder = tmp_path / "DIR" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                mean = np.full(3, 60)
                mean[channel] = 180
                pixels = rng.normal(mean, 30, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04}.jpg", quality=95)
    assert read_request(tmp_path / "requests.csv") == ["train/cat/0017.jpg", "cat/0021.jpg"]
    execute("own-data.md", names)
    (tmp_path / "net.py").write_text(blocks("own-data.md", "python")[0])
    torch.manual_seed(0)
    torch.save({"model": names["make"]().state_dict()}, tmp_path / "model.pt")
    run_all(blocks("own-data.md", "sh"), ("--device", "cpu"))
    assert (tmp_path / "page.html").exists()
    assert (tmp_path / "out2" / "dau.safetensors").exists()
    assert (tmp_path / "measured" / "evaluation.json").exists()
