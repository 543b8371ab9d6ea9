"""Pictures as users have them: upright, on white, in their full range, or refused by name."""

import os
import socket
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mllm_keeplora.data.conversation import MediaFile
from mllm_keeplora.data.file_kinds import describe_content
from mllm_keeplora.data.images import FORMATS, MAX_PIXELS, ImageError, load_image
from mllm_keeplora.data.preflight import IMAGES_ONLY

WHITE = [255, 255, 255]

# EXIF orientation -> what undoes it, by hand, as the standard describes rows and columns.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: p.swapaxes(0, 1)[::-1],
}
SAVED: dict[str, dict[str, object]] = {
    "jpg": {"quality": 100, "subsampling": 0},
    "png": {},
    "tif": {},
    "webp": {"lossless": True},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
}


def blocks() -> np.ndarray:
    """Different in every corner; blocks, so that lossy formats keep them."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return np.kron(colours, np.ones((8, 8, 1), np.uint8))


def pixels(source: Path | Image.Image) -> list:
    return np.asarray(load_image(source)).tolist()


@pytest.mark.parametrize("suffix", SAVED)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_upright_whatever_its_exif_says(suffix: str, orientation: int, tmp_path: Path) -> None:
    exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[274] = orientation
    Image.fromarray(blocks()).save(path, exif=exif, **SAVED[suffix])
    expected = UPRIGHT[orientation](blocks()).astype(int)
    for source in (path, Image.open(path)):  # as a record names it, and as a benchmark hands it over
        found = np.asarray(load_image(source)).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 8 * (suffix in ("jpg", "avif")) + 0.5
    once = load_image(path)
    assert load_image(once).tobytes() == once.tobytes()  # and it is turned once


def test_orientation_in_xmp_counts_as_well(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(blocks()).save(tmp_path / "a.png", pnginfo=_xmp(xmp))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), UPRIGHT[6](blocks()))


def _xmp(text: bytes):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", text.decode())
    return info


def test_a_damaged_exif_block_leaves_the_picture_as_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 8, 0, bytes([5, 9]), (b"eXIf", b"no tiff header")))
    assert pixels(path) == [[[5, 5, 5], [9, 9, 9]]]


def test_turning_keeps_what_is_transparent(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.new("RGBA", (3, 1), (10, 20, 30, 0))
    picture.putpixel((0, 0), (1, 2, 3, 255))
    picture.save(tmp_path / "a.png", exif=exif)
    assert pixels(tmp_path / "a.png") == [[[1, 2, 3]], [WHITE], [WHITE]]


# --- Transparency ---


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, depth: int, colour: int, row: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """One row of pixels, by the standard."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def gif(transparent: bool) -> bytes:
    """A screen of 4x1 of which the first frame covers two pixels, colours 1 and 3; 3 may be transparent."""
    palette = bytes([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    control = b"\x21\xf9\x04\x01\x00\x00\x03\x00" if transparent else b""
    codes = sum(code << 3 * place for place, code in enumerate((4, 1, 3, 5))).to_bytes(2, "little")
    frame = b"\x2c" + struct.pack("<HHHHB", 1, 0, 2, 1, 0) + b"\x02\x02" + codes + b"\0"
    return b"GIF89a" + struct.pack("<HHBBB", 4, 1, 0x91, 0, 0) + palette + control + frame + b";"


# File -> its pixels. Values in tRNS are in the file's own bit depth.
TRANSPARENT: dict[str, tuple[bytes, list]] = {
    "RGB, tRNS": (png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), (b"tRNS", struct.pack(">3H", 1, 2, 3))), [WHITE, [4, 5, 6]]),
    "RGB of 16 bit, tRNS": (
        png(
            2,
            16,
            2,
            struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x0400, 0x0500, 0x0600),
            (b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)),
        ),
        [WHITE, [4, 5, 6]],
    ),
    "L, tRNS": (png(2, 8, 0, bytes([5, 9]), (b"tRNS", struct.pack(">H", 9))), [[5, 5, 5], WHITE]),
    "L of 1 bit, tRNS": (png(2, 1, 0, bytes([0b01000000]), (b"tRNS", struct.pack(">H", 0))), [WHITE, WHITE]),
    "L of 2 bit, tRNS": (png(2, 2, 0, bytes([0b01100000]), (b"tRNS", struct.pack(">H", 1))), [WHITE, [170] * 3]),
    "L of 4 bit, tRNS": (png(2, 4, 0, bytes([0x3A]), (b"tRNS", struct.pack(">H", 10))), [[51] * 3, WHITE]),
    "L of 16 bit, tRNS": (
        png(2, 16, 0, struct.pack(">2H", 1000, 40000), (b"tRNS", struct.pack(">H", 1000))),
        [WHITE, [156] * 3],
    ),
    "LA": (png(2, 8, 4, bytes([50, 0, 100, 255])), [WHITE, [100] * 3]),
    "LA of 16 bit": (png(2, 16, 4, struct.pack(">4H", 1000, 0, 40000, 65535)), [WHITE, [156] * 3]),
    "RGBA": (png(2, 8, 6, bytes([9, 9, 9, 0, 0, 0, 0, 51])), [WHITE, [204] * 3]),
    "P, a transparent index": (
        png(2, 8, 3, bytes([0, 1]), (b"PLTE", bytes([10, 20, 30, 40, 50, 60])), (b"tRNS", b"\xff\0")),
        [[10, 20, 30], WHITE],
    ),
    "P, an alpha for each": (
        png(2, 8, 3, bytes([0, 1]), (b"PLTE", bytes([10, 20, 30, 40, 50, 60])), (b"tRNS", bytes([51, 0]))),
        [[206, 208, 210], WHITE],
    ),
    "GIF": (gif(True), [WHITE, [200, 0, 0], WHITE, WHITE]),
    "GIF without": (gif(False), [[10, 20, 30], [200, 0, 0], [0, 0, 200], [10, 20, 30]]),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_shows_white(name: str, tmp_path: Path) -> None:
    data, expected = TRANSPARENT[name]
    (tmp_path / "a.png").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(tmp_path / "a.png") == [expected]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, "") for mode in ("RGBA", "LA", "PA", "RGBa", "La")),
        *((mode, suffix) for mode in ("RGBA", "LA") for suffix in ("png", "webp", "tif")),
    ],
)
def test_modes_with_alpha_are_laid_on_white(mode: str, suffix: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (90, 90, 90, 0))
    picture.paste((100, 100, 100, 255), (0, 0, 4, 8))
    steps = {"La": ("LA", "La"), "RGBa": ("RGBa",), "PA": ("PA",), "LA": ("LA",), "RGBA": ()}[mode]
    for step in steps:
        picture = picture.convert(step)
    source: Path | Image.Image = picture
    if suffix:
        source = tmp_path / f"a.{suffix}"
        picture.save(source, lossless=True)
    found = np.asarray(load_image(source))
    assert (found[:, :4] == 100).all() and (found[:, 4:] == 255).all()


# --- Ranges and modes ---


@pytest.mark.parametrize(
    "kind", ["png", "tif", "big-endian tif", "jp2", "I;16", "I;16B", "I;16L", "pgm", "pgm of 12 bit"]
)
def test_grey_of_16_bits_keeps_all_its_levels(kind: str, tmp_path: Path) -> None:
    values = np.tile(np.arange(256, dtype=np.uint16) * 257, (4, 1))
    source: Path | Image.Image = tmp_path / f"a.{kind.split()[-1]}"
    if kind.startswith("I;16"):
        source = Image.frombytes(kind, (256, 4), values.astype(">u2" if kind == "I;16B" else "<u2").tobytes())
    elif kind.startswith("pgm"):
        bits = 12 if "12" in kind else 16
        source = tmp_path / "a.pgm"
        top = 2**bits - 1
        source.write_bytes(b"P5 256 4 %d\n" % top + (values >> 16 - bits).astype(">u2").tobytes())
    elif kind == "big-endian tif":
        Image.frombytes("I;16B", (256, 4), values.astype(">u2").tobytes()).save(source)
    else:
        Image.fromarray(values).save(source)
    assert np.asarray(load_image(source))[0].tolist() == [[level] * 3 for level in range(256)]


def tiff(bits: int, meaning: int, samples: int, data: bytes, width: int) -> bytes:
    """One row of grey, uncompressed."""
    tags = [(256, 3, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, meaning), (273, 4, 0)]
    tags += [(277, 3, 1), (278, 3, 1), (279, 4, len(data)), (339, 3, samples)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_a_tiff_of_12_bits_and_one_where_0_is_white(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(12, 1, 1, bytes([0x00, 0x0F, 0xFF]), 2))  # 0, 4095
    assert pixels(path) == [[[0] * 3, WHITE]]
    path.write_bytes(tiff(16, 0, 1, struct.pack("<2H", 0, 65535), 2))
    assert pixels(path) == [[WHITE, [0] * 3]]


REFUSED_MODES: dict[str, Callable[[Path], Path | Image.Image]] = {
    "32-bit integers": lambda path: Image.new("I", (4, 4), 70000),
    "floats": lambda path: Image.new("F", (4, 4), 0.5),
    "a TIFF of floats": lambda path: Image.new("F", (4, 4), 0.5).save(path) or path,
    "a TIFF of 32 bits": lambda path: Image.new("I", (4, 4), 70000).save(path) or path,
    "a TIFF of signed bytes": lambda path: path.write_bytes(tiff(8, 1, 2, bytes(4), 4)) and path,
    "a TIFF of signed 16 bits": lambda path: path.write_bytes(tiff(16, 1, 2, bytes(8), 4)) and path,
}


@pytest.mark.parametrize("name", REFUSED_MODES)
def test_values_without_a_stated_range_are_refused_by_mode(name: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="has mode '.', grey as .*no black and no white; save it with 8 or 16 bits"):
        load_image(REFUSED_MODES[name](tmp_path / "a.tif"))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("CMYK", "jpg"), ("CMYK", "tif"), ("LAB", "tif"), ("YCbCr", "jpg"), ("HSV", "")]
)
def test_other_colours_become_those_that_are_seen(mode: str, suffix: str, tmp_path: Path) -> None:
    """CMYK in JPEG is stored inverted, as Adobe's programs do and every reader expects."""
    source: Path | Image.Image = Image.new("RGB", (16, 16), (200, 30, 40)).convert(mode)
    if suffix:
        source.save(tmp_path / f"a.{suffix}")
        source = tmp_path / f"a.{suffix}"
    assert np.abs(np.asarray(load_image(source)).astype(int) - (200, 30, 40)).max() <= 6


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    picture = Image.new("1", (2, 1), 1)
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == [[[0] * 3, WHITE]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "mpo", "avif"])
def test_of_several_pictures_the_first_is_taken(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    red.save(path, save_all=True, append_images=[blue])
    assert np.abs(np.asarray(load_image(path)).astype(int) - (255, 0, 0)).max() <= 4


# --- What is no picture ---


def make_socket(path: Path) -> Path:
    here = os.open(".", os.O_RDONLY)  # names of sockets are short
    try:
        os.chdir(path.parent)
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)
    return path


IRREGULAR: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pipe": (lambda path: os.mkfifo(path) or path, r"a named pipe \(FIFO\)"),
    "link to a pipe": (lambda path: os.mkfifo(path.parent / "p") or path.symlink_to("p") or path, "a named pipe"),
    "socket": (make_socket, "a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero") or path, "a character device"),
    "folder": (lambda path: path.mkdir() or path, "a folder"),
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_what_is_no_regular_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    make, kind = IRREGULAR[name]
    with pytest.raises(ImageError, match=f"a.jpg is {kind}.*; expected a regular file"):
        load_image(make(tmp_path / "a.jpg"))


NO_PICTURE: dict[str, tuple[bytes, str]] = {
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer.*lfs pull",
    ),
    "annex": (b"../../.git/annex/objects/3k/Wz/SHA256E-s12--ab.jpg/SHA256E-s12--ab.jpg", "a git-annex pointer"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><body>404 Not Found", "an HTML page"),
    "HTML without type": (b"<html><head><title>Sign in</title>", "an HTML page"),
    "S3": (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>', "an XML text"),
    "JSON": (b'{"error": "Repository not found"}', "a JSON text"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(60), "compressed by gzip"),
    "zip": (b"PK\x03\x04" + bytes(60), "an archive"),
    "PDF": (b"%PDF-1.7\n" + bytes(60), "a PDF"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(60), "an HEIC picture.*save it as JPEG"),
    "MP4": (b"\0\0\0\x18ftypisom" + bytes(60), "a video"),
    "zeros": (bytes(5000), "nothing but zero bytes"),
    "text": (b"Not Found\n", "a text that begins with 'Not Found"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript drawing"),
    "noise": (bytes([200, 7, 3, 255] * 99), "does not decode.*none of the formats AVIF, BMP"),
}


@pytest.mark.parametrize("name", NO_PICTURE)
def test_a_file_that_is_something_else_is_named(name: str, tmp_path: Path) -> None:
    data, what = NO_PICTURE[name]
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"a.jpg (is )?{what}") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    assert IMAGES_ONLY.media([MediaFile("image", path)], "x") == {path: str(caught.value)}


def test_pictures_and_missing_files_are_not_taken_for_something_else(tmp_path: Path) -> None:
    for suffix in (*SAVED, "gif", "bmp", "ppm", "tga", "ico"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(blocks()).save(path)
        assert describe_content(path) is None
    assert describe_content(tmp_path / "none") is None
    assert "EPS" not in FORMATS  # Pillow starts Ghostscript for it


def announced(width: int, height: int) -> bytes:
    """A PNG of that size without its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((12000, 8000), "12000x8000 pixels; at most"),  # where Pillow warns
        ((20000, 10000), "too large; at most"),  # where it refuses
        ((201, 1), "201x1 pixels; one side may be at most 200 times the other"),
        ((1, 300), "1x300 pixels; one side"),
        ((0, 5), "does not decode|none to show"),
    ],
)
def test_sizes_that_no_model_takes_are_refused(size: tuple[int, int], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(announced(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=reason):
            load_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError):
            load_image(path)


def test_the_largest_sizes_are_taken(tmp_path: Path) -> None:
    Image.new("1", (200, 1)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (200, 1)
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_truncated_files_are_refused_in_every_thread_and_the_flag_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval sets it
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(whole)
    cut.write_bytes(whole.read_bytes()[:60000])
    refused: list[bool] = []

    def read() -> None:
        for path in (whole, cut) * 5:
            try:
                load_image(path)
            except ImageError:
                refused.append(path == cut)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == [True] * 20
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    with pytest.raises(ImageError):
        load_image(Image.open(cut))  # a benchmark's picture that was not read yet


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "jp2", "ppm", "tga", "ico", "qoi", "avif"]
)
def test_flipped_and_cut_bytes_give_a_picture_or_a_refusal(suffix: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path, exif=exif)
    whole = path.read_bytes()
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            data = bytearray(whole[: random.integers(1, len(whole))] if random.random() < 0.2 else whole)
            for place in random.integers(0, min(len(data), 200 if random.random() < 0.7 else len(data)), 3):
                data[place] = random.integers(0, 256)
            path.write_bytes(data)
            try:
                outcomes.add(load_image(path).mode)
            except ImageError as error:
                outcomes.add("refused")
                assert str(path) in str(error)
    assert outcomes <= {"RGB", "refused"} and "refused" in outcomes
