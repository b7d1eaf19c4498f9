"""A ledger of requests: one line of JSON each, only ever appended, every one with the digest of the last."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dau_fast.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_START = "0" * 64


def append_entry(path: Path, entry: dict[str, Any]) -> None:
    """Add `entry` to the ledger `path`, on the disk on return; one process at a time.

    Raises UserError, before anything is written, for a ledger that was changed.
    """
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"ledger '{path}' cannot be written: {error.strerror}") from error
    with os.fdopen(number, "r+b") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        entries = _parse(path, file.read())
        line = _line({**entry, "previous": entries[-1][0] if entries else _START})
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The ledger's entries in their order. Raises UserError where one was changed, left out or moved.

    What was cut off at the end does not show: keep the digest of the last line elsewhere.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"ledger '{path}' cannot be read: {error.strerror}") from error
    return [entry for _, entry in _parse(path, content)]


def _parse(path: Path, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Digest and entry of every line."""
    found: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            entry = json.loads(line)
            if _line(entry) != line:
                raise ValueError("it is not written as this program writes it")
            if entry["previous"] != (found[-1][0] if found else _START):
                raise ValueError("it does not follow the line before")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"line {number} of the ledger '{path}' was changed: {error}") from error
        found.append((hashlib.sha256(line).hexdigest(), entry))
    return found


def _line(entry: Any) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
