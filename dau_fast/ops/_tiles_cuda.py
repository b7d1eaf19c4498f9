"""What Triton's kernels of symmetric products share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def upper_tile(index, tiles):
    """Row and column of tile `index` of the tiles (tiles + 1) / 2 on and above the diagonal.

    Rows k and tiles - 1 - k have tiles + 1 of them together: these lie one after the other.
    """
    pair = index // (tiles + 1)
    place = index % (tiles + 1)
    second = place >= tiles - pair
    row = tl.where(second, tiles - 1 - pair, pair)
    return row, tl.where(second, row + place - (tiles - pair), row + place)
