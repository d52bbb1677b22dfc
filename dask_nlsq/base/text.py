"""How sizes, counts and tables are written."""

from collections.abc import Sequence
from math import inf

GB = 2**30  # bytes


def several(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def size(nbytes: float) -> str:
    if nbytes == inf:
        return "not known"
    unit, name = next((each for each in ((GB, "GiB"), (2**20, "MiB")) if nbytes >= 0.1 * each[0]), (2**10, "KiB"))
    return f"{nbytes / unit:.{2 if unit == GB else 1}f} {name}"
