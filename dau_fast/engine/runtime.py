"""How a run computes: the one place where device, precision, engine and processes are decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.errors import UserError, check_choice

# As they are; compiled; replayed as a CUDA graph; compiled and replayed.
ENGINES = ("eager", "compiled", "graphed", "captured")
_ON_CUDA = ("graphed", "captured")
_MOST_PARTS = 2**16  # of a batch: no batch is larger
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Runtime:
    """The settings of every loop and pass of a run. Raises UserError for what does not go together.

    precision: dtype of convolutions and matrix products under autocast, float64 for whole networks, None
    for float32. engine: how training steps run, "auto" or one of ENGINES. ranks: the processes that take
    every step together. accumulate: parts that a batch is taken in, one after the other; loop_parts: the
    same for single loops, by name. activation_checkpointing: compute blocks' activations again in the
    backward pass. shard: each process holds its share of a model that is trained. traces: folder for
    profiles of the first steps of every loop, None for none.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype | None = None
    engine: str = "eager"
    ranks: Ranks = ALONE
    accumulate: int = 1
    loop_parts: Mapping[str, int] = field(default_factory=dict)
    activation_checkpointing: bool = False
    shard: bool = False
    traces: Path | None = None

    def __post_init__(self) -> None:
        for name, parts in {"accumulate": self.accumulate, **self.loop_parts}.items():
            if type(parts) is not int or not 1 <= parts <= _MOST_PARTS:
                told = str(parts)[:80]
                raise UserError(
                    f"`{name}={told}`: expected how many parts of a batch, from 1 to {_MOST_PARTS}"
                )
        check_choice("engine", self.engine, ("auto", *ENGINES))
        if self.engine in _ON_CUDA and self.device.type != "cuda":
            raise UserError(f"`engine={self.engine}` needs a CUDA device: take eager or compiled here")
        if self.engine not in ("auto", "eager"):
            self._check_compilable()
        if self.shard and self.ranks.alone:
            raise UserError(
                "`shard=True` shares a model out to several processes, and there is one: start them with "
                "torchrun, or leave it out"
            )

    def _check_compilable(self) -> None:
        asked = f"`engine={self.engine}`"
        if not self.ranks.alone:
            raise UserError(f"{asked} is for one process, and there are {self.ranks.count}: take eager")
        if self.activation_checkpointing:
            raise UserError(f"{asked} does not go with `activation_checkpointing=True`: take eager")

    @property
    def precision_name(self) -> str:
        """The precision as `choose_precision` takes it."""
        return next(name for name, dtype in _PRECISIONS.items() if dtype == self.precision)

    def count_parts(self, loop: str) -> int:
        """How many parts the batches of `loop` are to be taken in."""
        return self.loop_parts.get(loop, self.accumulate)


def choose_device(name: str, local_rank: int | None = None, local_count: int = 1) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises UserError for CUDA where there is none.

    local_rank: number of this process among the `local_count` of its machine, each of which has a GPU of
    its own; where there are too few GPUs, all of them raise.
    """
    check_choice("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("`device=cuda`: PyTorch finds no CUDA device here: take `device=cpu`")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or local_rank is None:
        return torch.device(name)
    processes, found = max(local_count, local_rank + 1), torch.cuda.device_count()
    if processes > found:
        raise UserError(
            f"{processes} processes are too many for the {found} GPUs that PyTorch finds here: start no more "
            "processes than there are GPUs, or take `device=cpu`"
        )
    return torch.device("cuda", local_rank)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype a network computes in: bfloat16 under autocast, float64, or None for float32.

    auto is bf16 on CUDA. fp64 is slow: it is for comparing runs without the effects of rounding.
    """
    check_choice("precision", name, ("auto", *_PRECISIONS))
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return _PRECISIONS[name]
