"""Numbers with their unit, as people read them."""

from collections.abc import Sequence

GB = 1e9  # bytes, as `--memory_gb` and `video.cache_gb` count them


def format_bytes(number: float) -> str:
    """Three digits in units of 1000: 999 B, 3.07 MB, 14.1 GB."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def format_count(number: float) -> str:
    """Three digits in units of 1000: 12, 115 K, 7.06 B."""
    return _scaled(number, ("", "K", "M", "B", "T")).rstrip()


def _scaled(number: float, units: Sequence[str]) -> str:
    step = 0
    while abs(number) >= 999.5 and step < len(units) - 1:  # 999.5 rounds to four digits
        number, step = number / 1000, step + 1
    return f"{number:.3g} {units[step]}"
