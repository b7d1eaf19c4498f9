"""How much memory is free: a GPU's, or the machine's as far as this process may take it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch


class _Version(NamedTuple):
    """Where one version of Linux's control groups keeps the memory of a group.

    root: of the groups. limit, used: the files with the bytes that a group may take, and has taken.
    cache: what memory.stat calls the files in the group's cache, which go where room is needed.
    """

    root: Path
    limit: str
    used: str
    cache: str


# https://docs.kernel.org/admin-guide/cgroup-v1/memory.html and .../cgroup-v2.html. Where both versions are
# mounted, version 1 has the memory.
_ONE = _Version(
    Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_TWO = _Version(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`; of a CPU's, no more than the control groups allow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([_machine_free(), *_groups_free()]))


def _machine_free() -> int:
    """Bytes that the system could give without swapping; all that it has where it does not say."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups_free() -> Iterator[int]:
    """Bytes left in each control group of this process that has a limit: its own, and those above it."""
    own = _own_groups()
    for version in (_ONE, _TWO):
        group = own.get(version, PurePosixPath())
        # In a container the path is often that of the host, and the group is mounted as the root.
        for folder in (version.root / part for part in (group, *group.parents)):
            # No such group, or "max", which stands for no limit.
            with suppress(OSError, ValueError):
                yield _group_free(folder, version)


def _own_groups() -> dict[_Version, PurePosixPath]:
    """The group of this process, relative to the root, in each version that says one."""
    groups = {}
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                groups[_ONE if controllers else _TWO] = PurePosixPath(path.lstrip("/"))
    return groups


def _group_free(folder: Path, version: _Version) -> int:
    limit, used = (int((folder / name).read_text()) for name in (version.limit, version.used))
    usage = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - used + int(usage.get(version.cache, 0))
