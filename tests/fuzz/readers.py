"""Everything that reads what a stranger may have written, and settings."""

from __future__ import annotations

import base64
import io
import json
import random
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as serialize
from torch import nn

from dau_fast import checkpoints
from dau_fast.config import DauConfig
from dau_fast.data import arrays, arrow, split
from dau_fast.data.decoding import FORMATS, decode
from dau_fast.errors import UserError
from dau_fast.job.config_file import read_config
from dau_fast.job.ledger import append_entry, read_entries
from dau_fast.prune import Masks
from dau_fast.report.manifest import list_stale


@dataclass(frozen=True)
class Target:
    """What is fuzzed. samples: sound contents. run: reads one of them, damaged, in a folder of its own.

    passes: what it may raise.
    """

    samples: Callable[[], list[bytes]]
    run: Callable[[bytes, Path, random.Random], Any]
    passes: tuple[type[Exception], ...] = (UserError,)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def _written(write: Callable[[Path], None], suffix: str = "") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{suffix}")
        write(path)
        return path.read_bytes()


def _masks(network: nn.Module) -> Masks:
    weight = network[0].weight  # type: ignore[index]
    masks = Masks({"0.weight": torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5})
    masks.apply_(network)
    return masks


def _safetensors() -> list[bytes]:
    network = _mlp()
    split_text = split.encode_roles(np.array([0, 1, 2, 0], dtype=np.int8))
    origin = {"dataset": "digits", "split": split_text}
    plain = _written(lambda path: checkpoints.save(path, network, origin))
    masks = _masks(network)
    dense = _written(lambda path: checkpoints.save(path, network, origin, masks))
    sparse = _written(lambda path: checkpoints.save_sparse(path, network, masks, origin))
    return [plain, dense, sparse, serialize({}, metadata={"dau_fast": "{}"})]


def _load_checkpoint(suffix: str) -> Callable[[bytes, Path, random.Random], Any]:
    def load(content: bytes, folder: Path, _: random.Random) -> Any:
        path = folder / f"model{suffix}"
        path.write_bytes(content)
        metadata = checkpoints.load(path, _mlp())
        checkpoints.load_masks(path)
        return split.decode_roles(metadata["split"], 4) if "split" in metadata else None

    return load


def _pytorch() -> list[bytes]:
    def saved(content: Any, **options: Any) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **options)
        return file.getvalue()

    state = _mlp().state_dict()
    return [saved(state), saved({"state_dict": state}), saved(state, _use_new_zipfile_serialization=False)]


def _load_masks(content: bytes, folder: Path, _: random.Random) -> Any:
    path = folder / "masks.safetensors"
    path.write_bytes(content)
    return Masks.load(path)


def _arrays() -> list[bytes]:
    kinds = (np.zeros((4, 5, 6, 3), np.uint8), np.array([0, 1, 2, 1]), np.zeros((2, 3, 3, 1), np.uint8))
    found = []
    for array in kinds:
        file = io.BytesIO()
        np.save(file, array)
        found.append(file.getvalue())
    return found


def _read_arrays(content: bytes, folder: Path, chance: random.Random) -> Any:
    for part in ("train", "test"):
        (folder / part).mkdir()
        np.save(folder / part / "images.npy", np.zeros((4, 5, 6, 3), np.uint8))
        np.save(folder / part / "labels.npy", np.array([0, 1, 2, 1]))
    part, name = chance.choice(("train", "test")), chance.choice(("images", "labels"))
    (folder / part / f"{name}.npy").write_bytes(content)
    stored = arrays.read_arrays(folder)
    index = torch.arange(len(stored.source))
    channels, height, width = stored.source.shape
    if len(index) * channels * height * width < 1 << 20:
        stored.source.read(index, torch.empty((len(index), height, width, channels), dtype=torch.uint8))


def _pixels() -> Any:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))


def _images() -> list[bytes]:
    found = []
    for kind in FORMATS:
        file = io.BytesIO()
        _pixels().save(file, kind)
        found.append(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(file, "PNG")
    return [*found, file.getvalue()]


def _decode(content: bytes, _folder: Path, chance: random.Random) -> Any:
    return decode(io.BytesIO(content), "the image", chance.choice((None, 8)))


def _arrow() -> list[bytes]:
    import pyarrow as pa

    images = _images()
    info = {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    found = []
    for column in (pa.array(images, pa.binary()), pa.array([{"bytes": image} for image in images], kind)):
        table = pa.table({"image": column, "label": [i % 2 for i in range(len(images))]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": info})})
        for writer in (pa.ipc.new_stream, pa.ipc.new_file):
            file = io.BytesIO()
            with writer(file, table.schema) as out:
                out.write_table(table, max_chunksize=5)
            found.append(file.getvalue())
    return found


_SOUND_ARROW: list[bytes] = []


def _read_arrow(content: bytes, folder: Path, _: random.Random) -> Any:
    _SOUND_ARROW[:] = _SOUND_ARROW or _arrow()[:1]
    for part, held in (("train", content), ("test", _SOUND_ARROW[0])):
        (folder / part).mkdir()
        (folder / part / "data.arrow").write_bytes(held)
    stored = arrow.read_arrow(folder, 8, 1)
    out = torch.empty((len(stored.source), 8, 8, 3), dtype=torch.uint8)
    stored.source.read(torch.arange(len(stored.source)), out)


def _index(content: bytes, folder: Path, _: random.Random) -> Any:
    path = folder / "index.txt"
    path.write_bytes(content)
    return split.Forget.parse(f"indices:{path}", ("a", "b"))


def _forget(content: bytes, _folder: Path, _: random.Random) -> Any:
    text = content.decode(errors="surrogateescape").replace("indices", "index")
    return split.Forget.parse(text, ("a", "b"))


def _roles(content: bytes, _folder: Path, _: random.Random) -> Any:
    return split.decode_roles(content.decode(errors="replace"), 9)


def _config(suffix: str) -> Callable[[bytes, Path, random.Random], Any]:
    def read(content: bytes, folder: Path, _: random.Random) -> Any:
        path = folder / f"config{suffix}"
        path.write_bytes(content)
        return read_config(path)

    return read


_REPORT = {
    "schema": 1, "files": {"ga.safetensors": {"sha256": "00", "bytes": 3}}, "methods": {"ga": {"ua": 1.5}},
    "run": {
        "precision": "fp32", "engine": {"asked": "auto"}, "accumulate": 1, "activation_checkpointing": False,
        "sharded": False, "loop_parts": {"ga": 2}, "options": {"methods": ["ga"], "seed": 1, "out": None},
        "settings": {"ga": {"lr": 0.1}}, "methods": {"ga": {}},
    },
}  # fmt: skip


def _stale(content: bytes, folder: Path, _: random.Random) -> Any:
    (folder / "report.json").write_bytes(content)
    for name in list_stale(folder / "report.json", keep=()):
        assert "/" not in name
        assert not name.startswith(".")


def _ledger() -> list[bytes]:
    def write(path: Path) -> None:
        for number in range(3):
            append_entry(path, {"request": str(number), "subject": {"a": "0" * 64}})

    return [_written(write)]


def _read_ledger(content: bytes, folder: Path, _: random.Random) -> Any:
    (folder / "ledger").write_bytes(content)
    return read_entries(folder / "ledger")


# ---- settings

_VALUES: tuple[Any, ...] = (
    0, -1, 1, 2.5, True, None, "1", "", float("nan"), float("inf"), -float("inf"), 10**12, 10**400,
    -(10**5000), 1e308, 1e-308, (), (0.5,), [1, 2], {}, b"x", np.float32(0.1), np.int64(3), torch.tensor(0.1),
    object(),
)  # fmt: skip


def _settings(_content: bytes, _folder: Path, chance: random.Random) -> Any:
    sizes = {"retain_images": chance.randrange(1, 10**6), "forget_images": chance.randrange(1, 10**5)}
    usual = DauConfig.default(classwise=chance.random() < 0.5, **sizes)
    names = chance.sample(sorted(vars(usual)), chance.randrange(1, 4))
    return DauConfig(**{**vars(usual), **{name: chance.choice(_VALUES) for name in names}})


def _random_masks() -> list[bytes]:
    return [_written(_masks(_mlp()).save)]


TARGETS: dict[str, Target] = {
    "safetensors": Target(_safetensors, _load_checkpoint(".safetensors")),
    "pytorch": Target(_pytorch, _load_checkpoint(".pt")),
    "masks": Target(_random_masks, _load_masks),
    "npy": Target(_arrays, _read_arrays),
    "images": Target(_images, _decode),
    "arrow": Target(_arrow, _read_arrow),
    "indices": Target(lambda: [b"1 2 3\n17 4", b"5"], _index),
    "forget": Target(lambda: [b"random:0.1", b"class:a", b"class:1", b"random:1e-3"], _forget),
    "roles": Target(lambda: [_packed(bytes([0, 1, 2] * 3)), _packed(b"")], _roles),
    "json": Target(lambda: [json.dumps(_REPORT).encode(), b'{"seed": 3, "settings": {}}'], _config(".json")),
    "toml": Target(lambda: [b'seed = 3\nforget = "class:3"\n[settings.dau]\nlr = 0.1\n'], _config(".toml")),
    "report": Target(lambda: [json.dumps(_REPORT).encode()], _stale),
    "ledger": Target(_ledger, _read_ledger),
    "settings": Target(lambda: [b""], _settings),
}


def _packed(roles: bytes) -> bytes:
    return base64.b64encode(zlib.compress(roles))
