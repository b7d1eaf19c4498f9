"""Weights in files: safetensors with our metadata, and other people's files without running their code."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from dau_fast.errors import UserError, exists
from dau_fast.prune import Masks
from dau_fast.prune.sparse_file import compress, expand, note, recover

# Metadata of pruned models alone: the shapes of a sparse file's masks, the note of a dense one's.
_SPARSE, _MASKED = "sparse", "masked"


def save(path: Path, network: nn.Module, metadata: dict[str, str], masks: Masks | None = None) -> None:
    """Write the weights of `network` to `path` as safetensors, with `metadata`.

    The metadata is one JSON text under "dau_fast": several keys would come out in any order.
    masks: of a pruned network, whose zeros they are; the file is a dense one for every reader, and its
    metadata says which tensors are masked, so that `load_masks` finds the masks again.
    Raises UserError where the masks are of another model, or a masked weight is not zero.
    """
    tensors = _own_memory(network.state_dict())
    if masks is not None:
        metadata = {**metadata, _MASKED: note(tensors, masks)}
    path.write_bytes(serialize(tensors, metadata={"dau_fast": json.dumps(metadata)}))


def _own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state`, each in memory of its own: safetensors refuses weights that are tied."""
    held: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        own = tensor.contiguous()
        place = own.untyped_storage().data_ptr()
        held[name] = own.clone() if place in taken else own
        taken.add(place)
    return held


def save_sparse(path: Path, network: nn.Module, masks: Masks, metadata: dict[str, str]) -> None:
    """Write `network` to `path` as `save` does, without the weights that `masks` mask: `load` reads it.

    Raises UserError where the masks are of another model, or a masked weight is not zero.
    """
    tensors, shapes = compress(network.state_dict(), masks)
    text = json.dumps({**metadata, _SPARSE: shapes})
    path.write_bytes(serialize(tensors, metadata={"dau_fast": text}))


def check(path: Path) -> None:
    """UserError for a file that `load` cannot read, whatever the network."""
    if not exists(path, "file"):
        raise UserError(f"checkpoint '{path}' does not exist: name a .safetensors or .pt file")
    _read(path)


def load(path: Path, network: nn.Module) -> dict[str, str]:
    """Load weights from a safetensors file, or from a PyTorch one without running its code, in place.

    Returns the metadata (empty for a PyTorch file). A file of `save_sparse` gives the weights that were
    saved, zeros included; `load_masks` gives their masks. Prefixes that wrappers put before every name, such
    as "module.", are left out where the network has none. Raises UserError for a file that is missing,
    damaged, executable or of another architecture; `network` is then unchanged.
    """
    if not exists(path, "file"):
        raise UserError(f"checkpoint '{path}' does not exist: name a .safetensors or .pt file")
    wanted = network.state_dict()
    tensors, metadata, _ = _read(path, wanted)
    tensors = _strip_prefixes(tensors, wanted.keys())
    wrong = [
        name
        for name in wanted.keys() | tensors.keys()
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    ]
    if wrong:
        raise UserError(
            f"checkpoint '{path}' is of another architecture ({len(wrong)} of its tensors differ, "
            f"such as '{min(wrong)}'): name the one it was saved from with `arch`{_hint(tensors, wanted)}"
        )
    _check_finite(path, {name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})
    network.load_state_dict(tensors)
    return metadata


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"'{broken[0]}' of checkpoint '{path}' holds NaN or infinity ({len(broken)} of its tensors do): "
            "its training went wrong, take an earlier one"
        )


def load_masks(path: Path) -> Masks | None:
    """The masks of a pruned model's file, None for any other. Raises UserError as `load` does.

    Exact for files of `save_sparse`, and of `save` with masks: there all zeros of a masked tensor are
    masked weights but for those that the metadata names.
    """
    return _read(path)[2]


def _metadata(text: str) -> dict[str, str]:
    """What `save` wrote; ValueError for anything else."""
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its dau_fast metadata is damaged")
    return found


def _read(
    path: Path, wanted: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str], Masks | None]:
    """The tensors by name, the metadata, and the masks of a pruned model.

    wanted: what a network holds, beyond whose shapes nothing that is sparse is expanded; None to trust it.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = _metadata((file.metadata() or {}).get("dau_fast", "{}"))
            shapes, masked = metadata.pop(_SPARSE, None), metadata.pop(_MASKED, None)
            masks = None if masked is None else recover(tensors, masked)
            if shapes is not None:
                tensors, masks = expand(tensors, shapes, wanted)
            for name, tensor in tensors.items():
                _check_plain(name, tensor)
            return tensors, metadata, masks
        except RecursionError as error:
            raise UserError(f"checkpoint '{path}' cannot be read: its metadata is nested too deep") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"checkpoint '{path}' cannot be read: {error}") from error
    return _read_pytorch(path), {}, None


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a file of torch.save."""
    _check_not_packed(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # on pickle protocols, before it refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets in a strange file
        raise UserError(
            f"checkpoint '{path}' is damaged or holds more than weights, and nothing in it was run: "
            "save the state_dict as .safetensors"
        ) from error
    content = _unwrap(content)
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UserError(f"checkpoint '{path}' holds no state_dict: save model.state_dict()")
    try:
        for name, tensor in content.items():
            _check_plain(name, tensor)
    except ValueError as error:
        raise UserError(f"checkpoint '{path}' cannot be used: {error}") from error
    return dict(content)


# Where training scripts put the weights in a checkpoint that holds more.
_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
# What DataParallel, torch.compile, Lightning and others put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")


def _unwrap(content: Any) -> Any:
    """The weights in what a script saved, as deep as they lie."""
    while isinstance(content, dict):
        inner = next((content[key] for key in _KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            return content
        content = inner
    return content


def _strip_prefixes(tensors: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """`tensors` without prefixes that all names have and none of the `wanted` ones."""
    while tensors and not tensors.keys() & wanted:
        first = next(iter(tensors))
        prefix = next((found for found in _PREFIXES if first.startswith(found)), None)
        if prefix is None or not all(name.startswith(prefix) for name in tensors):
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _hint(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What else may help with a ResNet for large images, whose stem we change for small ones."""
    stem = "conv1.weight"
    if stem in tensors and stem in wanted and tensors[stem].shape[-1] == 7 and wanted[stem].shape[-1] == 3:
        return ", such as torchvision:resnet18, whose stem is the ordinary one"
    return ""


def _check_plain(name: str, tensor: Tensor) -> None:
    """ValueError unless `tensor` is dense, real and in memory, as the weights of a network are."""
    dense = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized)
    if not dense or tensor.device.type == "meta" or tensor.is_complex():
        kind = str(tensor.dtype if dense else tensor.layout).removeprefix("torch.")
        where = " without numbers (meta)" if tensor.device.type == "meta" else ""
        raise ValueError(f"'{name}' is {kind}{where}: expected dense weights of real numbers")


def _check_not_packed(path: Path) -> None:
    """UserError where a file of torch.save is compressed, which it never is: it may unpack to anything."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as packed:
            unpacked = sum(entry.file_size for entry in packed.infolist())
    # What zipfile raises for a damaged file has no common type; PyTorch then refuses the file in its words.
    except Exception:
        return
    if unpacked > path.stat().st_size:
        raise UserError(
            f"checkpoint '{path}' is compressed and would unpack to {unpacked / 1e6:,.0f} MB: save it with "
            "torch.save, which compresses nothing"
        )
