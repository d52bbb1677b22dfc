"""How sizes, counts and tables are written."""

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from html import escape
from math import ceil, floor, inf, log10

from dask.utils import format_bytes

GB = 2**30  # bytes


def several(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def near(name: str, known: Iterable[str], before: str = ": ") -> str:
    """The question whether the known name that is most like ``name`` was meant; empty where none is like it."""
    found = get_close_matches(name, [*known], 1)
    return f"{before}did you mean {found[0]!r}?" if found else ""


def numbered(names: Sequence[str], before: str = "") -> list[str]:
    """The names, with 1, 2, ... behind those that occur several times."""
    kinds, seen, found = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        found.append(f"{name}{before}{seen[name]}" if kinds[name] > 1 else name)
    return found


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


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same for a page or a notebook."""

    def line(tag, cells):
        return f"<tr>{''.join(f'<{tag}>{escape(cell.strip())}</{tag}>' for cell in cells)}</tr>"

    return f"<table><thead>{line('th', head)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"


def at_least(gib: float) -> str:
    """A limit in GiB that suffices, rounded up to two digits."""
    unit = 10.0 ** (floor(log10(gib)) - 1)
    return f"{ceil(gib / unit) * unit:.2g}"


def size(nbytes: float) -> str:
    """Bytes as Dask writes them; "not known" for a limit that is inf."""
    return "not known" if nbytes == inf else format_bytes(round(nbytes))
