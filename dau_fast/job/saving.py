"""Files that are on the disk when they are said to be, and their digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_synced(path: Path, content: bytes) -> None:
    """Make `content` the file `path`, whole or not at all, and on the disk on return."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Return when what is in the file `path` is on the disk; a folder's files, each."""
    if path.is_dir():
        for entry in path.iterdir():
            sync_file(entry)
        return
    _sync(path)


def sync_folder(path: Path) -> None:
    """Return when the names in the folder `path` are on the disk."""
    if os.name == "nt":  # which cannot open a folder, and keeps names in order itself
        return
    _sync(path)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def hash_file(path: Path) -> str:
    """The SHA-256 of the file `path`, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
