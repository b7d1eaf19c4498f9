"""Where randomness comes from: generators of our own, and PyTorch's global one for the length of a loop."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str) -> int:
    """A number that depends on `seed` and `purpose` alone, not on what ran before."""
    # 32 bits, because PyTorch's CPU generator ignores all others.
    mixed = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(1)
    return int(mixed[0])


def generator_for(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    """A generator on `device` that depends on `seed` and `purpose` alone, not on what ran before."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's global generators of the CPU and of `device` set to `seed`; as before on leaving.

    What draws from them is not ours to choose: dropout, stochastic depth, initial weights.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
