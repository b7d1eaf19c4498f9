"""Free memory: what the system and the control groups of this process leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dau_fast.data.memory import free_memory

CPU = torch.device("cpu")
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
MB = 2**20
MEMINFO = {"/proc/meminfo": "MemTotal: 9999999 kB\nMemFree: 10 kB\nMemAvailable: 24576000 kB\n"}
AVAILABLE = 24576000 * 1024


def version_1(group: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    """The files of a control group, as Linux writes them; bytes."""
    folder = f"/sys/fs/cgroup/memory{group}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"cache 4096\ninactive_file 1\ntotal_inactive_file {cached}\n",
    }


def version_2(group: str, limit: int | str, used: int, cached: int = 0) -> dict[str, str]:
    folder = f"/sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\n",
    }


def own(*lines: str) -> dict[str, str]:
    return {"/proc/self/cgroup": "".join(f"{line}\n" for line in lines)}


# What version 1 has for a group without a limit.
UNLIMITED = 9223372036854771712
BOTH = own("5:devices:/x", "4:memory,hugetlb:/a/b", "1:name=systemd:/c", "0::/c")

CASES: dict[str, tuple[dict[str, str], int]] = {
    "nothing": ({}, MACHINE),
    "no group": (MEMINFO, AVAILABLE),
    "2: no limit": (MEMINFO | version_2("", "max", 40 * MB), AVAILABLE),
    "2: limit": (MEMINFO | version_2("", 80 * MB, 40 * MB, 10 * MB), 50 * MB),
    "2: reached": (MEMINFO | version_2("", 20 * MB, 40 * MB, 10 * MB), 0),
    "2: wide": (MEMINFO | version_2("", 2 * AVAILABLE, 0), AVAILABLE),
    "2: own": (MEMINFO | own("0::/a:b/c") | version_2("/a:b/c", 80 * MB, 40 * MB), 40 * MB),
    "2: above": (
        MEMINFO | own("0::/a/b/c") | version_2("/a", 70 * MB, 40 * MB) | version_2("/a/b/c", 80 * MB, 5 * MB),
        30 * MB,
    ),
    "2: of the host": (MEMINFO | own("0::/docker/12ab") | version_2("", 80 * MB, 40 * MB), 40 * MB),
    "2: outside": (MEMINFO | own("0::/../../x") | version_2("", 80 * MB, 40 * MB), 40 * MB),
    "1: no limit": (MEMINFO | version_1("", UNLIMITED, 40 * MB), AVAILABLE),
    "1: limit": (MEMINFO | version_1("", 700 * MB, 100 * MB, 50 * MB), 650 * MB),
    "1: reached": (MEMINFO | version_1("", 100 * MB, 200 * MB, 50 * MB), 0),
    "1: own": (
        MEMINFO | BOTH | version_1("/a/b", 700 * MB, 100 * MB) | version_1("", UNLIMITED, 5 * MB), 600 * MB
    ),
    "1: above": (
        MEMINFO | BOTH | version_1("/a/b", UNLIMITED, 1 * MB) | version_1("/a", 700 * MB, 200 * MB), 500 * MB
    ),
    "1: of the host": (MEMINFO | BOTH | version_1("", 700 * MB, 100 * MB), 600 * MB),
    "another's": (MEMINFO | BOTH | version_1("/x", 700 * MB, 100 * MB), AVAILABLE),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_free_memory_is_what_system_and_control_groups_leave(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, expected = CASES[name]

    def read_text(self: Path, *_: object) -> str:
        if str(self) not in files:
            raise FileNotFoundError(self)
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert free_memory(CPU) == expected


def test_free_memory_of_this_machine_is_less_than_it_has() -> None:
    assert 0 < free_memory(CPU) <= MACHINE
