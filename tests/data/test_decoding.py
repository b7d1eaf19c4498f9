"""Decoding images: which are, by how many threads, and a clear line for the others."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin
from storing import save_folder

from dau_fast.data import decoding
from dau_fast.data.decoding import FORMATS, decode
from dau_fast.data.folder import Files
from dau_fast.data.named import load
from dau_fast.data.streaming import StreamedImages
from dau_fast.errors import UserError


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    monkeypatch.setattr(decoding.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [decoding.count_decoder_threads(processes) for processes in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    for processes in (1, 3):
        images = load("folder", pictures, stream="on", processes=processes)
        assert isinstance(images, StreamedImages)
        assert isinstance(images.source, Files)
        assert images.source.threads == 8 // processes


@pytest.mark.parametrize("threads", [1, 3, 100])
def test_files_are_decoded_by_as_many_threads_as_asked_for(
    threads: int, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Files(sorted(map(str, pictures.glob("train/*/*.png"))), None, threads)
    index, names = torch.arange(36).flip(0), set()
    fetch = Files.fetch
    monkeypatch.setattr(
        Files,
        "fetch",
        lambda self, number: (names.add(threading.get_ident()), time.sleep(0.01), fetch(self, number))[2],
    )
    out = torch.empty((36, 16, 16, 3), dtype=torch.uint8)
    source.read(index, out)
    assert min(threads, 2) <= len(names) <= threads
    expected = [np.asarray(Image.open(source.paths[number])) for number in index]
    assert torch.equal(out, torch.from_numpy(np.stack(expected)))


def png_with_a_broken_chunk() -> bytes:
    """A signature, a sound header, and then a chunk whose name is not letters."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(8 * 25))[:6])
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"\x01\x02\x03\x04", b"") + chunk(b"IEND", b"")


DAMAGED = {
    "text.png": b"this is no image",
    "empty.png": b"",
    "truncated.png": None,
    "broken_chunk.png": png_with_a_broken_chunk(),
    "header_cut.ppm": b"P6 8",
    "pixels_cut.ppm": b"P6\n8 8\n255\n" + bytes(10),
    # 60,000 x 60,000 pixels in a file of 54 bytes.
    "bomb.bmp": struct.pack("<2sIIIIIIHH6I", b"BM", 54, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_unreadable_image_is_an_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    save_folder(tmp_path)
    damaged = tmp_path / "train/cat" / name
    whole = (tmp_path / "train/cat/0.png").read_bytes()
    content = DAMAGED[name]
    damaged.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match="is not a readable image") as raised:
        load("folder", tmp_path)
    assert str(damaged) in str(raised.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_images_of_every_promised_format_are_read_whatever_their_names_say(kind: str, tmp_path: Path) -> None:
    save_folder(tmp_path)
    Image.new("RGB", (8, 8), (200, 30, 60)).save(tmp_path / "train/cat/9.png", kind)
    pixels = load("folder", tmp_path).pixels[2]
    assert (pixels[:, 4, 4].int() - torch.tensor([200, 30, 60])).abs().max() <= 8


def test_a_picture_of_several_cameras_is_a_jpeg_of_the_first() -> None:
    content = BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 60)).save(
        content, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    assert np.abs(decode(content, "it", None).astype(int) - (200, 30, 60)).max() <= 8


def test_a_program_is_never_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow goes by the content, and has Ghostscript draw what is EPS."""
    save_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "train/cat/05.png", "EPS")
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **_: started.append(given))
    with pytest.raises(
        UserError, match=r"05\.png' is not a readable image of JPEG, PNG, .*: remove or replace"
    ):
        load("folder", tmp_path)
    assert started == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Decoding of color\nplanes failed"), struct.error("unpack requires 4 bytes"),
        OverflowError("too large"), IndexError("list index"), KeyError(3), EOFError(), MemoryError(),
    ],
    ids=repr,
)  # fmt: skip
def test_whatever_a_decoder_raises_is_an_error_that_names_the_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise error

    save_folder(tmp_path)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(
        UserError, match=rf"0\.png' is not a readable image .*{type(error).__name__}"
    ) as raised:
        load("folder", tmp_path)
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_values_of_16_bits_are_scaled_and_not_cut_off(kind: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65000, 65406, 65535]], dtype=np.uint16)
    content = BytesIO()
    Image.fromarray(values).save(content, kind)
    found = decode(content, "it", None)
    assert found[..., 0].tolist() == [[0, 0, 1, 1], [128, 253, 254, 255]]
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_a_range_are_refused(dtype: type) -> None:
    content = BytesIO()
    Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(dtype)).save(content, "TIFF")
    with pytest.raises(UserError, match=r"it holds .* nobody says what is white: store it with 8 or 16 bits"):
        decode(content, "it", None)
