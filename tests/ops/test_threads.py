"""The threads of C++ ops: PyTorch's own, but in a forked process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dau_fast.ops import _native

# Numbers are enough for two threads. A child that forks after PyTorch's threads have started finds none of
# them, and PyTorch's own operations with several threads would wait for ever.
FORKED = """
import os, sys
import torch
from dau_fast.ops import image_batch

torch.set_num_threads(2)
pixels, index = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8), torch.arange(64)
half = torch.full((1,), 0.5)
before = image_batch(pixels, index, half, half)
torch.ones(1 << 20).sum()
child = os.fork()
if child == 0:
    again = image_batch(pixels, index, half, half)
    os._exit(0 if bytes(again.numpy().data) == bytes(before.numpy().data) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.skipif(_native.extension is None, reason="the compiled extension is not installed")
def test_a_forked_process_has_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
