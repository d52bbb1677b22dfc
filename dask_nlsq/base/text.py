"""How sizes, counts and tables are written."""

from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Context
from difflib import get_close_matches
from html import escape
from math import ceil, floor, inf, isfinite, log10

from dask.utils import format_bytes

GB = 2**30  # bytes
PLAIN = -4, 9  # powers of ten between which numbers are written without an exponent
DIGITS = 15  # that a float has
FAR = 1e3  # times a large value, above which its error leaves no digit of it
LMFIT = {  # names in lmfit's results, and ours
    "best_values": "params", "best_fit": "predict()", "init_values": "history", "residual": "residuals()",
    "eval": "predict(x)", "eval_components": "components(x)", "eval_uncertainty": "confidence_band(x)",
    "conf_interval": "confidence_intervals()", "ci_report": "profile(name)", "fit_report": "summary()", "plot_fit": "plot()",
    "plot_residuals": "plot()", "covar": "pcov", "chisqr": "chi_square", "redchi": "reduced_chi_square",
    "rsquared": "r_squared", "ndata": "n_points", "nfree": "dof", "nvarys": "free", "var_names": "param_names",
}  # fmt: skip
EXACT = Context(prec=40)  # whatever the user's context is


def several(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def near(name: str, known: Iterable[str], before: str = ": ") -> str:
    """The question whether the known name that is most like ``name`` was meant; empty where none is like it."""
    found = get_close_matches(name, [*known], 1)
    return f"{before}did you mean {found[0]!r}?" if found else ""


class NamesOfLmfit:
    """Attributes that results of lmfit have are answered with the name that this result has for them."""

    def __getattr__(self, name: str):
        own = LMFIT.get(name, "")
        if own and own.partition("(")[0] in dir(self):
            raise AttributeError(f"{type(self).__name__} has no {name!r}, which is lmfit's name: use {own}", name=name)
        return object.__getattribute__(self, name)  # whose error stands


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


def measured(value: float, error: float, full: bool = False) -> tuple[str, str]:
    """A value and its standard error. The error has two significant digits; the value ends at the same decimal place.

    So the Guide to the Expression of Uncertainty in Measurement has it (JCGM 100:2008, 7.2.6): 20.070 and 0.043. Very large
    and very small ones share the exponent of the larger. With ``full`` all digits of both.
    """
    if full:
        return repr(float(value)), repr(float(error))
    if not (isfinite(value) and 0 < error < inf):
        return f"{value:.9g}", f"{error:.2g}"
    last, first = (int(f"{each:.1e}".partition("e")[2]) for each in (error, max(abs(value), error)))
    if first - last >= DIGITS or (first >= PLAIN[1] and error > FAR * abs(value)):
        return f"{value:.{DIGITS if last < first else 3}g}", f"{error:.2g}"
    unit, shift = EXACT.scaleb(1, last - 1), 0 if PLAIN[0] <= first < PLAIN[1] else first
    rounded = (EXACT.quantize(EXACT.create_decimal(float(each)), unit) for each in (value, error))
    rounded = (EXACT.scaleb(each if each else abs(each), -shift) for each in rounded)  # 0 has no sign
    near, doubt = (f"{each:f}" + (f"e{shift:+03d}" if shift else "") for each in rounded)
    return near, doubt


def relative(value: float, error: float) -> str:
    """The error as percent of the value; empty where that says nothing."""
    if not (value and 0 < error < inf):
        return ""
    share = abs(error / value)
    return ">999%" if share >= 9.995 else f"{share:.2%}" if share >= 1e-4 else f"{share * 100:.1g}%"


def html_text(text: str) -> str:
    """Lines with aligned columns, as they are."""
    return f"<pre>{escape(text)}</pre>"


def at_least(gib: float) -> str:
    """A limit in GiB that suffices, rounded up to two digits."""
    unit = 10.0 ** (floor(log10(gib)) - 1)
    return f"{ceil(gib / unit) * unit:.2g}"


def size(nbytes: float) -> str:
    """Bytes as Dask writes them; "not known" for a limit that is inf."""
    return "not known" if nbytes == inf else format_bytes(round(nbytes))
