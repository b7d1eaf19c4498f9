"""Checkpoints: weights and metadata as they were, and strange files refused without running their code."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_models import mlp, same, seeded_images, weights
from torch import Tensor, nn

from dau_fast.checkpoints import load, save
from dau_fast.errors import UserError
from dau_fast.models import SmallResNet
from dau_fast.prune import Masks


def test_weights_and_metadata_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, other = SmallResNet(1, 4), SmallResNet(1, 4)
    network(seeded_images(4, 1, 8, 8))
    save(tmp_path / "model.safetensors", network, {"arch": "small", "split": "ü"})
    assert load(tmp_path / "model.safetensors", other) == {"arch": "small", "split": "ü"}
    assert same(other, weights(network))
    assert other.stem[1].num_batches_tracked == 1


def test_weights_that_do_not_lie_in_order_are_saved_too(tmp_path: Path) -> None:
    network = SmallResNet(3, 4).to(memory_format=torch.channels_last)
    save(tmp_path / "model.safetensors", network, {})
    other = SmallResNet(3, 4)
    load(tmp_path / "model.safetensors", other)
    assert same(other, weights(network))


@pytest.mark.parametrize("form", ["plain", "nested", "parallel", "parallel and nested"])
def test_a_state_dict_of_pytorch_is_loaded(form: str, tmp_path: Path) -> None:
    network, other = mlp(), mlp()
    content: dict[str, Any] = dict(network.state_dict())
    if "parallel" in form:
        content = dict(nn.DataParallel(network).state_dict())
        assert all(name.startswith("module.") for name in content)
    if "nested" in form:
        content = {"epoch": 3, "state_dict": content}
    torch.save(content, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", other) == {}
    assert same(other, weights(network))


@pytest.mark.parametrize("key", ["model", "model_state_dict", "net", "weights"])
@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module._orig_mod.", "model.", "_orig_mod.module.model."]
)
def test_weights_of_a_training_script_are_found_under_its_keys_and_prefixes(
    key: str, prefix: str, tmp_path: Path
) -> None:
    network, other = mlp(), mlp()
    named = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 3, "optimizer": {"state": {}}, key: named}, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", other) == {}
    assert same(other, weights(network))


def test_a_missing_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UserError, match="does not exist") as raised:
            load(path, mlp())
        assert str(path) in str(raised.value)


def refused(path: Path, complaint: str) -> None:
    """Loading `path` is a UserError that names it, and leaves the network as it was."""
    network = mlp()
    before = weights(network)
    with pytest.raises(UserError, match=complaint) as raised:
        load(path, network)
    assert str(path) in str(raised.value)
    assert same(network, before)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_checkpoint_is_refused(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save(path, mlp(), {})
    else:
        torch.save(mlp().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "cannot be read" if suffix == ".safetensors" else "damaged")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_that_is_something_else_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("no weights here, only words" * 10)
    refused(path, "cannot be read" if suffix == ".safetensors" else "damaged")


@pytest.mark.parametrize(
    "other", [mlp(hidden=6), mlp(classes=4), nn.Linear(6, 3), nn.Sequential(*mlp(), nn.Linear(3, 3))], ids=str
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_another_architecture_are_refused(suffix: str, other: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save(path, other, {})
    else:
        torch.save(other.state_dict(), path)
    refused(path, "of another architecture")


def test_the_complaint_about_another_architecture_counts_what_differs(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", mlp(classes=4), {})
    refused(tmp_path / "model.safetensors", r"2 of its tensors differ, such as '2\.bias'")


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {"weight": 3}, {"state_dict": {"weight": "x"}}], ids=str
)
def test_a_pytorch_file_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "holds no state_dict")


def test_a_state_dict_whose_keys_are_not_names_is_refused(tmp_path: Path) -> None:
    torch.save({0: torch.zeros(5, 6)}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "checkpoint")


class Trap:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> Any:
        return open, (str(self.evidence), "w")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".safetensors"])
def test_code_in_a_checkpoint_is_never_run(suffix: str, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    path = tmp_path / f"model{suffix}"
    trap = tmp_path / "trap.pt"
    torch.save({"0.weight": Trap(evidence)}, trap)
    torch.load(trap, weights_only=False)["0.weight"].close()
    assert evidence.exists(), "the trap must work where it is not guarded against"
    evidence.unlink()
    trap.rename(path)
    refused(path, "cannot be read" if suffix == ".safetensors" else "nothing in it was run")
    assert not evidence.exists()


def test_code_in_a_bare_pickle_is_never_run(tmp_path: Path) -> None:
    evidence, path = tmp_path / "evidence", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Trap(evidence), protocol=2))
    pickle.loads(path.read_bytes()).close()
    evidence.unlink()
    refused(path, "nothing in it was run")
    assert not evidence.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(mlp(), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "save the state_dict")


# ---- files that lie

DEEP = "[" * 100_000


@pytest.mark.parametrize("key", ["", "sparse", "masked"])
def test_metadata_nested_too_deep_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps({key: DEEP}) if key else DEEP
    save_file(mlp().state_dict(), path, {"dau_fast": text})
    refused(path, "cannot be read: its metadata is nested too deep")
    save_file({"arena": torch.zeros(8, dtype=torch.uint8)}, path, {"dau_fast_masks": DEEP})
    with pytest.raises(UserError, match="cannot be read"):
        Masks.load(path)


def test_more_numbers_than_the_file_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(path, "cannot be read")


def test_sparse_weights_are_not_expanded_beyond_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, count = tmp_path / "model.safetensors", 8_000_000
    tensors = {"dau_fast.masks": torch.zeros(count // 8, dtype=torch.uint8), "0.weight": torch.zeros(0)}
    save_file(tensors, path, {"dau_fast": json.dumps({"sparse": json.dumps({"0.weight": [count]})})})
    monkeypatch.setattr(Masks, "__getitem__", lambda *_: pytest.fail("a mask was unpacked"))
    refused(path, r"its masks are of another architecture, such as that of '0\.weight'")


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "sparse_csr": lambda tensor: tensor.to_sparse_csr() if tensor.ndim == 2 else tensor,
    "meta": lambda tensor: tensor.to("meta"),
    "qint8": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_weights_are_refused(kind: str, tmp_path: Path) -> None:
    torch.save({name: ODD[kind](tensor) for name, tensor in mlp().state_dict().items()}, tmp_path / "odd.pt")
    refused(tmp_path / "odd.pt", r"cannot be used: '\d.* is .*: expected dense|is damaged")


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            content = bytes(20_000_000) if entry.filename.endswith("data/0") else plain.read(entry)
            bomb.writestr(entry.filename, content)
    refused(tmp_path / "bomb.pt", r"is compressed and would unpack to 20 MB")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, suffix: str, tmp_path: Path) -> None:
    network, path = mlp(), tmp_path / f"model{suffix}"
    with torch.no_grad():
        network[2].bias[1] = value
    if suffix == ".safetensors":
        save(path, network, {})
    else:
        torch.save(network.state_dict(), path)
    refused(path, r"'2\.bias' of checkpoint '.*' holds NaN or infinity \(1 of its tensors")
