"""How sizes, counts and tables are written."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from math import ceil, floor, inf, log10

from dask.utils import format_bytes

GB = 2**30  # bytes


def several(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def near(name: str, known: Iterable[str], before: str = ": ") -> str:
    """The question whether the known name that is most like ``name`` was meant; empty where none is like it."""
    found = get_close_matches(name, [*known], 1)
    return f"{before}did you mean {found[0]!r}?" if found else ""


def printable(text: str) -> str:
    """Without what a terminal takes for commands, in text that comes from a file."""
    return "".join(each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text)


def table(rows: Sequence[Sequence[str]], sides: str = "") -> list[str]:
    """Lines with aligned columns, each flush with the side "<" (left, the default) or ">" that ``sides`` has for it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = [*zip(sides.ljust(len(widths), "<"), widths, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)).rstrip() for row in rows
    ]


def at_least(gib: float) -> str:
    """A limit in GiB that suffices, rounded up to two digits."""
    unit = 10.0 ** (floor(log10(gib)) - 1)
    return f"{ceil(gib / unit) * unit:.2g}"


def size(nbytes: float) -> str:
    """Bytes as Dask writes them; "not known" for a limit that is inf."""
    return "not known" if nbytes == inf else format_bytes(round(nbytes))
