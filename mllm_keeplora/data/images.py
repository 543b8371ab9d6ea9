"""Pictures as the models see them: every picture, wherever it comes from, goes through `load_image`.

The rules, which `docs/your_own_data.md` states for users:

- upright: the EXIF orientation is applied, in every format that carries one;
- what is transparent shows white;
- 16-bit grey is scaled by the full range of its type, 65535 to 255; a TIFF of 12 bits by 4095;
- modes without a stated range (floats, 32-bit integers) are refused;
- of several pictures in one file (animations, pages) the first is taken;
- CMYK and Lab are converted, colour profiles are not applied;
- more than `MAX_PIXELS` pixels, or one side more than `MAX_ASPECT` times the other, are refused.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from mllm_keeplora.data.file_kinds import describe_content
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.regular_files import irregular_kind

# Where Pillow begins to warn of decompression bombs: 268 MB of RGB. No model looks at a tenth of it.
MAX_PIXELS = 89_478_485
# Qwen's processors refuse more; others would first scale the short side up, and the long side with it.
MAX_ASPECT = 200
# Those whose pixels have a known meaning and that Pillow decodes itself (for EPS it starts Ghostscript).
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI"),
    *("TGA", "TIFF", "WEBP"),
)

_BACKGROUND = "white"
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
# A PNG's transparent colour is stated in the file's bit depth, and Pillow takes it for one of 8 bits.
_TO_8_BITS = {"L;2": lambda value: value * 85, "L;4": lambda value: value * 17, "RGB;16B": lambda value: value >> 8}
# Tags, and what two of them may hold.
_TIFF_BITS, _TIFF_MEANING, _TIFF_SAMPLES = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2

_flag_lock = threading.Lock()
_flag_users = 0
_flag_before = False


class ImageError(KeepLoRAError, ValueError):
    """A picture that cannot be used; the message names it, what is wrong, and the remedy."""


def load_image(source: Path | Image.Image) -> Image.Image:
    """A picture as every model sees it: RGB, upright, read to its end.

    Training, checks, evaluation and chat all call it, so that one file is one picture everywhere. Calling it
    on its own result changes nothing. Any number of threads may call it.

    Args:
        source: a file, or a picture that is open already (lmms-eval hands those over).

    Raises:
        ImageError: the file is missing, no regular file, empty, truncated, or no picture of `FORMATS`; or the
            picture is too large, too narrow, or of a mode whose values have no stated range.
    """
    name = f"image {source}" if isinstance(source, Path) else f"image of {source.width}x{source.height} pixels"
    if isinstance(source, Image.Image):
        return _decode(source, name)
    _check_file(source, name)
    try:
        opened = Image.open(source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large; {_too_large()}") from error
    # Pillow's readers raise whatever a damaged header leads them to; there is no common base class.
    except Exception as error:
        raise ImageError(_undecoded(name, source, error)) from error
    with opened:
        return _decode(opened, name, source)


def _check_file(path: Path, name: str) -> None:
    try:
        kind = irregular_kind(path)
        empty = kind is None and path.stat().st_size == 0
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist") from error
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise ImageError(f"{name} cannot be read: {error}") from error
    if kind is not None:
        raise ImageError(f"{name} is {kind}; expected a regular file")
    if empty:
        raise ImageError(f"{name} is empty (0 bytes)")


def _decode(image: Image.Image, name: str, path: Path | None = None) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width}x{height} pixels; {_too_large()}")
    if min(width, height) < 1:
        raise ImageError(f"{name} has {width}x{height} pixels, none to show")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name} has {width}x{height} pixels; one side may be at most {MAX_ASPECT} times the other. Crop or pad it"
        )
    try:
        with _refused_when_truncated():
            transparent = _transparent_colour(image)  # Pillow forgets the bit depth when it decodes
            image.load()
        return _to_rgb(image, transparent, name)
    except ImageError:
        raise
    # As above, and decoders of damaged data likewise.
    except Exception as error:
        raise ImageError(_undecoded(name, path, error)) from error


def _too_large() -> str:
    return f"at most {MAX_PIXELS} are read, because a larger one may be a decompression bomb. Scale it down"


def _undecoded(name: str, path: Path | None, error: Exception) -> str:
    what = None if path is None else describe_content(path)
    if what is not None:
        return f"{name} is {what}"
    reason = str(error).splitlines()[0] if str(error) else ""
    if "cannot identify image file" in reason:  # Pillow repeats the path
        reason = f"none of the formats {', '.join(FORMATS)}"
    return f"{name} does not decode ({type(error).__name__}: {reason})"


@contextmanager
def _refused_when_truncated() -> Iterator[None]:
    """Makes Pillow raise on truncated files inside the block, whatever threads are in it.

    lmms-eval sets `ImageFile.LOAD_TRUNCATED_IMAGES` for the whole process when it is imported, and from then
    on Pillow fills the missing part with grey and says nothing. The flag is global: the first thread in
    clears it, the last one out puts it back.
    """
    global _flag_users, _flag_before
    with _flag_lock:
        if _flag_users == 0:
            _flag_before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _flag_users += 1
    try:
        yield
    finally:
        with _flag_lock:
            _flag_users -= 1
            if _flag_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _flag_before


def _transparent_colour(image: Image.Image) -> bytes | int | tuple[int, ...] | None:
    """What `info` states as transparent, in the values that the decoded pixels have. Call before decoding."""
    colour = image.info.get("transparency")
    tiles = getattr(image, "tile", []) if image.format == "PNG" else []
    raw = tiles[0][3] if tiles else None
    scale = _TO_8_BITS.get(raw) if isinstance(raw, str) else None
    if scale is None or colour is None:
        return colour
    return tuple(map(scale, colour)) if isinstance(colour, tuple) else scale(colour)


def _to_rgb(image: Image.Image, transparent: bytes | int | tuple[int, ...] | None, name: str) -> Image.Image:
    shown, tags = _upright(image, transparent), getattr(image, "tag_v2", {})
    # Pillow scales PGM files of more than 8 bits to the range of 16.
    if shown.mode in _GREY_16 or (shown.mode == "I" and image.format == "PPM"):
        twelve_bits = tags.get(_TIFF_BITS) in (12, (12,))
        rgb = _grey_16_to_rgb(shown, 4095 if twelve_bits else 65535, tags.get(_TIFF_MEANING) == _WHITE_IS_ZERO)
    elif shown.mode in ("I", "F") or tags.get(_TIFF_SAMPLES) in (_SIGNED, (_SIGNED,)):
        kind = "floating-point numbers" if shown.mode == "F" else "32-bit or signed integers"
        raise ImageError(
            f"{name} has mode {shown.mode!r}, grey as {kind}, which states no black and no white; save it with 8 "
            "or 16 bits, scaled as it is to be seen"
        )
    elif shown.has_transparency_data:
        # Premultiplied grey converts to grey alone.
        rgba = (shown.convert("LA") if shown.mode == "La" else shown).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, _BACKGROUND), rgba).convert("RGB")
    else:
        rgb = shown.convert("RGB")
    rgb.info = {}  # nothing is left to apply, should it come here again
    return rgb


def _upright(image: Image.Image, transparent: bytes | int | tuple[int, ...] | None) -> Image.Image:
    """A copy that is turned as its EXIF or XMP says, and has no other metadata than what is transparent."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # A damaged EXIF block raises all kinds of errors; programs that show pictures then show them as stored.
    except Exception:
        orientation = None
    shown = image.copy()
    shown.info = {} if transparent is None else {"transparency": transparent}
    if orientation in range(2, 9):
        shown.getexif()[ExifTags.Base.Orientation] = orientation
        shown = ImageOps.exif_transpose(shown)
    return shown


def _grey_16_to_rgb(image: Image.Image, top: int, inverted: bool) -> Image.Image:
    """Values 0 to `top` as RGB, black to white, or white to black where `inverted`."""
    values = np.asarray(image).astype(np.int64)
    levels = ((top - values if inverted else values) * 255 + top // 2) // top
    levels[values == image.info.get("transparency", -1)] = 255  # the background
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
