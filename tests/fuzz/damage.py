"""Sound contents with a few random changes."""

from __future__ import annotations

import random


def damage(content: bytes, chance: random.Random) -> bytes:
    """`content` with a few random changes."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        chance.choice(_DAMAGES)(found, chance)
    return bytes(found)


def _place(found: bytearray, chance: random.Random) -> int:
    # Headers decide, and stand at the beginning or the end.
    reach = min(len(found), chance.choice((16, 256, 4096, 1 << 30)))
    place = chance.randrange(reach + 1)
    return place if chance.random() < 0.8 else len(found) - place


def _flip(found: bytearray, chance: random.Random) -> None:
    if found:
        found[min(_place(found, chance), len(found) - 1)] ^= 1 << chance.randrange(8)


def _cut(found: bytearray, chance: random.Random) -> None:
    del found[_place(found, chance) :]


def _remove(found: bytearray, chance: random.Random) -> None:
    place = _place(found, chance)
    del found[place : place + chance.randrange(1, 64)]


def _insert(found: bytearray, chance: random.Random) -> None:
    place = _place(found, chance)
    found[place:place] = chance.choice(_PIECES) * chance.choice((1, 1, 1, 3, 1000))


def _number(found: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 2, 4, 8))
    edges = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, chance.getrandbits(64))
    value = chance.choice(edges) % (1 << 8 * size)
    place = _place(found, chance)
    found[place : place + size] = value.to_bytes(size, chance.choice(("little", "big")))


def _double(found: bytearray, chance: random.Random) -> None:
    place = _place(found, chance)
    found[place:place] = found[place : place + chance.randrange(1, 512)]


_DAMAGES = (_flip, _flip, _cut, _remove, _insert, _number, _double)
_PIECES = (
    b"\0", b"\xff", b"[", b"{", b'"', b"9", b"-", b"1e999", b"NaN", b"\\u0000", b"../", b"\x1b[2J",
    b"\xf0\x9f", b",", b":", b"\n", b" ", b"null", b"true", "\u202e".encode(),
)  # fmt: skip
