"""What lies where a picture or a clip should be: for messages about files that do not decode."""

import re
from pathlib import Path

_HEAD_BYTES = 1024  # enough for every signature below
_TEXT_SHOWN = 40

# How files begin that often carry the name of a picture or clip. The first that fits is told.
_BEGINNINGS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what)
    for pattern, what in (
        (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; run 'git lfs pull' where it came from"),
        (
            rb"[./\w-]{0,200}/annex/objects/",
            "a git-annex pointer, not the file itself; run 'git annex get' where it came from",
        ),
        (rb"\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)", "an HTML page; a server sent it in place of the file"),
        (rb"\s*(<\?xml.*?)?<svg", "an SVG drawing; save it as PNG"),
        (rb"\s*<\?xml|\s*<error>", "an XML text; a server sent it in place of the file"),
        (rb'\s*[{\[]\s*["{}\]]', "a JSON text; a server sent it in place of the file"),
        (rb"\x1f\x8b", "compressed by gzip; unpack it"),
        (rb"BZh\d|\xfd7zXZ\0|\x28\xb5\x2f\xfd", "compressed; unpack it"),
        (rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!", "an archive; unpack it"),
        (rb".{257}ustar", "an archive (tar); unpack it"),
        (rb"%PDF-", "a PDF; save its pages as PNG"),
        (rb"%!PS", "a PostScript drawing; save it as PNG"),
        (rb".{4}ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", "an HEIC picture, which is not read; save it as JPEG"),
        (rb"ffconcat|#EXTM3U", "a playlist, which names other files; name those files"),
        (rb"PAR1", "a Parquet table"),
        (rb"\x89HDF", "an HDF5 file"),
        (rb".{4}ftyp(?!avi[fs])|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV\x01", "a video"),
        (rb"ID3|RIFF.{4}WAVE|OggS|fLaC", "a sound"),
        (rb"(?P<zeros>\0+)\Z", "nothing but zero bytes; a download that did not finish leaves such files"),
    )
)


def describe_content(path: Path) -> str | None:
    """What a file is by its first bytes, with what to do about it; None where they do not tell.

    Ask about files that did not decode: a picture or clip in order is not recognised here.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    for beginning, what in _BEGINNINGS:
        if beginning.match(head):
            return what
    text = head[:_TEXT_SHOWN].decode("ascii", errors="replace")
    if head and text.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable() and "\ufffd" not in text:
        return f"a text that begins with {text!r}"
    return None
