"""Sparse files: the same weights bit by bit, small, and read where the dense ones are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dau_fast import checkpoints, models
from dau_fast.errors import UserError
from dau_fast.prune import Masks, omp
from dau_fast.prune.sparse_file import compress, expand


def pruned(arch: str = "small", sparsity: float = 0.95) -> tuple[nn.Module, Masks]:
    torch.manual_seed(0)
    network = models.build(arch, 10, (3, 32, 32)).to(memory_format=torch.channels_last)
    network(torch.randn(4, 3, 32, 32))  # BatchNorm statistics that are not the first
    masks = omp(network, sparsity)
    masks.apply_(network)
    return network, masks


@pytest.mark.parametrize("arch", ["small", "resnet18"])
def test_weights_come_back_bit_by_bit_from_a_small_file(tmp_path: Path, arch: str) -> None:
    network, masks = pruned(arch)
    dense, sparse = tmp_path / "dense.safetensors", tmp_path / "sparse.safetensors"
    checkpoints.save(dense, network, {"split": "x" * 700}, masks)
    checkpoints.save_sparse(sparse, network, masks, {"split": "x" * 700})
    other = models.build(arch, 10, (3, 32, 32))
    assert checkpoints.load(sparse, other) == {"split": "x" * 700}
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), _bytes(network.state_dict()[name])), name
    assert checkpoints.load_masks(sparse) == checkpoints.load_masks(dense) == masks
    assert load_file(dense).keys() == network.state_dict().keys()
    checkpoints.save(dense, network, {})
    assert checkpoints.load_masks(dense) is None
    assert sparse.stat().st_size <= 0.15 * dense.stat().st_size


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_values_that_compare_equal_to_others_are_kept_bit_by_bit() -> None:
    values = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-42, 0.0, 5.0])
    masks = Masks({"w": torch.tensor([True, True, True, True, False, True])})
    tensors, found = expand(*compress({"w": values, "steps": torch.tensor(3)}, masks))
    assert torch.equal(tensors["w"].view(torch.int32), values.view(torch.int32))
    assert tensors["steps"] == 3
    assert found == masks


@pytest.mark.parametrize("value", [1.0, -0.0, float("nan")])
def test_a_masked_weight_that_is_not_zero_is_refused(value: float) -> None:
    masks = Masks({"w": torch.tensor([True, False])})
    with pytest.raises(UserError, match=r"'w' is not zero where it is masked.*apply_"):
        compress({"w": torch.tensor([2.0, value])}, masks)


def test_a_dense_file_keeps_weights_that_are_zero_by_chance(tmp_path: Path) -> None:
    network, masks = pruned()
    name = next(iter(masks))
    weights = dict(network.named_parameters())[name].detach()
    kept = masks[name].nonzero()
    weights[tuple(kept[0])], weights[tuple(kept[5])] = 0.0, -0.0
    file = tmp_path / "dense.safetensors"
    checkpoints.save(file, network, {}, masks)
    assert checkpoints.load_masks(file) == masks
    other = models.build("small", 10, (3, 32, 32))
    assert checkpoints.load(file, other) == {}
    assert torch.equal(dict(other.named_parameters())[name], weights)


@pytest.mark.parametrize(
    "text", ['{"gone": []}', '{"head.weight": [640]}', '{"head.weight": "x"}', "[]", "7", "{"]
)
def test_a_damaged_note_of_masks_is_named(tmp_path: Path, text: str) -> None:
    file, network = tmp_path / "dense.safetensors", models.build("small", 10, (3, 32, 32))
    checkpoints.save(file, network, {"masked": text})
    with pytest.raises(UserError, match=r"checkpoint '.*dense.safetensors' cannot be read: "):
        checkpoints.load_masks(file)


def test_a_dense_file_of_weights_that_do_not_follow_the_masks_is_refused(tmp_path: Path) -> None:
    _, masks = pruned()
    with pytest.raises(UserError, match="is not zero where it is masked"):
        checkpoints.save(tmp_path / "file", models.build("small", 10, (3, 32, 32)), {}, masks)
    with pytest.raises(UserError, match="another model"):
        checkpoints.save(tmp_path / "file", nn.Linear(2, 2), {}, masks)
    assert not (tmp_path / "file").exists()


def test_masks_of_another_model_are_refused() -> None:
    for shape in ((3,), (2, 1)):
        with pytest.raises(UserError, match="no weight like the one of 'w'"):
            compress({"w": torch.zeros(shape)}, Masks({"w": torch.tensor([True, False])}))
    with pytest.raises(UserError, match="'w'"):
        compress({}, Masks({"w": torch.tensor([True, False])}))


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    network, masks = pruned()
    file = tmp_path / "sparse.safetensors"
    checkpoints.save_sparse(file, network, masks, {})
    with pytest.raises(UserError, match="another architecture"):
        checkpoints.load(file, models.build("resnet18", 10, (3, 32, 32)))
