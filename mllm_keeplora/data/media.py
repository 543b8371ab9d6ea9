"""Images and clips as files: reading an image."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile

from mllm_keeplora.errors import KeepLoRAError

# Everything Pillow's decoders raise on damaged files; it has no common base class.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(KeepLoRAError, ValueError):
    """An image file that is missing, empty or does not decode."""


@contextmanager
def refuse_truncated_images() -> Iterator[None]:
    """Makes Pillow raise on truncated files inside the block.

    lmms-eval sets `ImageFile.LOAD_TRUNCATED_IMAGES` for the whole process when it is imported, and from then
    on Pillow fills the missing part with grey and says nothing. The flag is global: enter the block outside
    any thread pool.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_image(path: Path) -> Image.Image:
    """Reads an image file completely, as RGB. Call inside `refuse_truncated_images`.

    Raises:
        ImageError: the file is missing, empty, truncated or no image that Pillow can read.
    """
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"image {path} is empty (0 bytes)")
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist") from error
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(f"image {path} does not decode ({type(error).__name__}: {error})") from error


def file_state(path: Path) -> tuple[int, int] | None:
    """(size in bytes, time of the last change in ns); None for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
