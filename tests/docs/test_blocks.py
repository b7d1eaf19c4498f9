"""Every code block of the guides runs as it stands, one after the other, and so does the notebook."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from calling import environment
from PIL import Image
from test_commands import run
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.data.requests import read_request
from dau_fast.methods import plugins
from dau_fast.metrics import plugins as attack_plugins
from dau_fast.prune import plugins as prune_plugins

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (
    "own-model.md", "own-data.md", "own-method.md", "quickstart.md", "choosing.md", "reading-the-report.md",
    "several-gpus.md", "trackers.md", "troubleshooting.md",
)  # fmt: skip
EXAMPLES = DOCS.parent / "examples"


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
        "retrained": train_again(batches[1:]), "train_again": train_again, "logged": logged,
        "log": lambda *told: logged.append(told),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_quickstart_and_what_reads_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (told,) = run_all(blocks("quickstart.md", "sh"), ("--epochs", 1, "--device", "cpu"))
    assert "retrained" in told
    execute("reading-the-report.md", read := {})
    assert len(read["report"]["run"]["forget"]["indices"]) == 91
    execute("quickstart.md", names := {})
    assert names["result"].avg_gap is not None
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "forgotten.pt").exists()


@pytest.mark.slow
def test_choosing(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    execute("choosing.md", names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["dau", "ft", "ssd"]
    # What stands last counts.
    run_all(blocks("choosing.md", "sh"), ("--epochs", 1, "--device", "cpu", "--tune", 1, "--repeats", 1))


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")
def test_several_gpus(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = blocks("several-gpus.md", "sh")
    program, *arguments = shlex.split(command)
    assert program == "torchrun"
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    end = ["--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    subprocess.run([*begin, *arguments, *end], check=True, capture_output=True, env=environment())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["processes"] == 2
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 0)):
        monkeypatch.setenv(name, str(value))
    execute("several-gpus.md", names)
    assert names["result"].history


@pytest.mark.slow
def test_trackers(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stand-ins with the signatures of TensorBoard's SummaryWriter and of trackio."""
    written: list[tuple[Any, ...]] = []

    class SummaryWriter(nullcontext[None]):
        def __enter__(self) -> Any:
            return self

        def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
            written.append((tag, float(scalar_value), global_step))

    trackio = ModuleType("trackio")
    trackio.init = lambda project, config: written.append((project, config["turns"]))  # type: ignore[attr-defined]
    trackio.log = lambda metrics, step: written.append((step, *metrics))  # type: ignore[attr-defined]
    trackio.finish = lambda: written.append(("finished",))  # type: ignore[attr-defined]
    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.chdir(tmp_path)
    execute("trackers.md", names)
    history = names["result"].history
    assert [row[1:] for row in written if row[0] == "game/auc"] == list(
        zip(history["auc"], history["step"], strict=True)
    )
    assert ("progress/dau", 100.0, history["step"][-1]) in written
    assert (history["step"][-1], *names["CURVES"]) in written
    assert written[-1] == ("finished",)


def test_lines_that_troubleshooting_explains_are_said_somewhere() -> None:
    table = (DOCS / "troubleshooting.md").read_text().partition("| it says")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(quoted) > 8
    source = "\n".join(path.read_text() for path in (DOCS.parent / "dau_fast").rglob("*.py"))
    # Texts are broken over lines there.
    together = re.sub(r'"\s*\n\s*f?"', "", source)
    assert [line for line in quoted if line not in together] == []


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["result"].after.ua > 90
    assert names["result"].retain_accuracy[1] > names["result"].retain_accuracy[0] - 1
    assert "retrained" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
