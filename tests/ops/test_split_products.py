"""Products of float32 in three of TF32: their parts, and how exact they are."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tf32 import TF32

from dau_fast.ops._split_products import multiplied_in, split, split_product


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_add_up_and_the_first_fits_tf32(transposed: bool) -> None:
    x = torch.cat([torch.randn(50, 20), torch.randn(50, 20) * 1e-30, torch.zeros(1, 20)])
    x = x.T if transposed else x
    high, low = split(x)
    assert torch.equal(high + low, x)
    assert not (high.contiguous().view(torch.int32) & 0x1FFF).any()
    assert (low.abs() <= x.abs() * 2**-10).all()


def test_the_process_multiplies_as_before_whatever_happens() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        split_product(torch.ones(2, 3), torch.ones(2, 3))
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("with_base", [False, True])
def test_three_products_are_as_exact_as_one_of_float32(with_base: bool) -> None:
    x, y, base = torch.randn(40, 300), torch.randn(300, 50), torch.randn(40, 50)
    with TF32() as products:
        found = split_product(x, y, base.clone(), 0.5) if with_base else split_product(x, y)
    assert products.taken == ["tf32"] * 3
    exact = x.double() @ y.double()
    exact = base.double() + 0.5 * exact if with_base else exact
    assert (found - exact).norm() / exact.norm() < 1e-6


def test_threads_that_meet_leave_the_process_as_it_was() -> None:
    """Without waiting, the second one would take the first one's setting for the process's own."""
    settings, entered = torch.backends.cuda.matmul, threading.Event()
    before = settings.fp32_precision

    def second() -> None:
        entered.set()
        with multiplied_in("ieee"):
            time.sleep(0.2)

    with multiplied_in("tf32"):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        time.sleep(0.05)
        assert settings.fp32_precision == "tf32"
    thread.join()
    assert settings.fp32_precision == before


# ---- on the device that was chosen with --device


def test_products_on_the_device_whatever_the_process_is_set_to(device: torch.device) -> None:
    x, y = torch.randn(1000, 1100, device=device), torch.randn(1100, 900, device=device)
    exact = x.double() @ y.double()
    for process in ("ieee", "tf32"):
        with multiplied_in(process):
            found = split_product(x, y)
        assert (found - exact).norm() / exact.norm() < 1e-5
