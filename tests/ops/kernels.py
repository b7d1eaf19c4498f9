"""Building Triton kernels on a machine without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

# Every day one chip is enough, that of the literature's machines.
CAPABILITIES = (
    pytest.param(80, marks=pytest.mark.slow),
    90,
    pytest.param(100, marks=pytest.mark.slow),
)


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel. registers: a thread. spilled: bytes of local memory a thread."""

    registers: int
    spilled: int


def build(kernel: Any, arguments: dict[str, Any], capability: int, folder: Path, **options: int) -> Resources:
    """Compile `kernel` for compute capability `capability` / 10, without a device.

    arguments: by name, a type such as "*fp32" or "i32" ("*fp32:16" where divisible by 16), or a
    value for what is constant. options: such as num_warps.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    names = [parameter.name for parameter in kernel.params]
    assert set(names) == set(arguments), set(names) ^ set(arguments)
    types = {name: given for name, given in arguments.items() if isinstance(given, str) and _is_type(given)}
    constants = {name: given for name, given in arguments.items() if name not in types}
    signature = {name: types[name].split(":")[0] if name in types else "constexpr" for name in names}
    aligned = [i for i, name in enumerate(names) if types.get(name, "").endswith(":16")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    built = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    found = Resources(usage["REG"], usage["STACK"] + usage["LOCAL"])
    if "DAU_FAST_RESOURCES" in os.environ:  # benchmarks/kernels.py keeps what builds take
        row = {"kernel": kernel.fn.__name__, "capability": capability, **asdict(found)}
        with Path(os.environ["DAU_FAST_RESOURCES"]).open("a") as file:
            file.write(json.dumps(row) + "\n")
    return found


def _is_type(given: str) -> bool:
    return re.fullmatch(r"\*?(fp|bf|i|u)\d+(:16)?", given) is not None


def with_sizes_of_one(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` as a launch with every size and stride 1 has them: Triton makes constants of those."""
    return {n: 1 if isinstance(a, str) and a.startswith("i32") else a for n, a in arguments.items()}


class Launches:
    """Kernels of a module that are not run: `grids` are those they were launched on, by kernel, in order."""

    def __init__(self, module: Any, patch: pytest.MonkeyPatch) -> None:
        self.grids: list[tuple[str, tuple[int, ...]]] = []
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, _Counted(name, self))

    @property
    def names(self) -> list[str]:
        """Of the kernels, in the order of their launches."""
        return [name for name, _ in self.grids]


class _Counted:
    def __init__(self, name: str, launches: Launches) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches.grids.append((self.name, grid))
        return lambda *_, **__: None
