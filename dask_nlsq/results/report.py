"""One page about a fit, to keep beside the data: HTML that needs nothing else, pictures included."""

import base64
import inspect
import platform
import re
import textwrap
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from html import escape
from io import BytesIO
from math import inf, isfinite, prod
from pathlib import Path

import numpy as np

from ..base.files import write_whole
from ..base.text import measured, several, size
from ..data.store import address
from ..memory.machine import detect_total_system_memory, process_settings, version_of
from ..model.function import function_name, own_function
from . import plots
from .binning import Log, survey
from .coordinates import coordinate as coordinate_of
from .coordinates import coordinates, data_of, plane
from .diagnostics import along
from .statistics import by_title

PACKAGES = ("dask_nlsq", "jax", "numpy", "scipy", "dask", "distributed", "zarr", "matplotlib")
FACTS = {
    "dof": "degrees of freedom",
    "cost": "cost",
    "condition": "condition number",
    "n_points": "points used",
    "n_masked": "points masked",
    "n_omitted": "points omitted, not finite",
}
NONE_OF_THEM = ("points masked", "points omitted, not finite")  # rows that a page has only where there are some
MOST_PANELS = 6  # coordinates that are drawn
NONE = "\N{EN DASH}"
LEVEL = 0.95  # of the confidence intervals
SMALL = (4.1, 3.2)  # inches, of pictures that stand beside each other
LONG = 40  # sweeps from which their table is folded
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --faint: #5f5f5f; --line: #d8d8d8; --page: #fff; --good: #00664a;
  --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --faint: #a0a0a0; --line: #444; --page: #1b1c1e; --good: #5fd3ac; --bad: #ff8a80 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { margin: 0; overflow-wrap: anywhere } h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem }
.faint { color: var(--faint) } .good { color: var(--good) } .bad { color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem 1.4rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } td.number, th.number { text-align: right; white-space: nowrap }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .6rem;
  break-inside: avoid }
figure.wide { grid-column: 1 / -1 }
figure img { display: block; max-width: 100%; margin: auto }
figcaption { color: #444; font-size: .85rem; text-align: center }
.beside { display: flex; flex-wrap: wrap; column-gap: 2.5rem } .beside td, .beside th { padding-right: 1rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: .8rem }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--line); border-radius: 6px; font-size: .85rem }
@media print {
  :root { --ink: #000; --faint: #444; --page: #fff; --good: #000; --bad: #000 }
  body { margin: 0; max-width: none } pre { white-space: pre-wrap } tr { break-inside: avoid }
}
"""


def report(result, path, *, coordinate: int | str | None = 0, log: Log = None) -> Path:
    """Write one page about a fit: pictures, parameters, statistics, history, plan, and where all of it comes from.

    The pictures read the data once. A result that does not hold the data gets a page without those of the data.

    Parameters
    ----------
    result : FitResult
    path : path
        Of an HTML file; one that is there is replaced when all is done.
    coordinate, log
        What the data are drawn against first, and logarithmic axes, as in `dask_nlsq.plots.fit`.

    Raises
    ------
    FileNotFoundError
        Where the directory of ``path`` does not exist.
    ModuleNotFoundError
        Without matplotlib.
    """
    return written(path, lambda: page(result, coordinate, log))


def written(path, make: Callable[[], str]) -> Path:
    """Write the page that ``make`` makes, once it is known that the file can be there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no directory {path.parent} for the report {path.name}: create it, or give another path")
    plots.need_matplotlib()
    write_whole(path, [make().encode()])
    return path


def html_page(title: str, *parts: str) -> str:
    """A page of these parts, which are HTML; ``title`` is plain text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def where_written() -> list[tuple[str, str]]:
    """Rows about the machine and the packages that a page was made with."""
    return [
        ("page written on", f"{platform.node()}: {platform.platform()}, {process_settings()['cores']} cores"),
        ("memory", size(detect_total_system_memory() or inf)),
        ("Python", platform.python_version()),
        *((package, version_of(package)) for package in PACKAGES),
    ]


def page(result, coordinate: int | str | None = 0, log: Log = None, groups: str = "") -> str:
    """The HTML of `report`, with what is said of the groups of a fit."""
    name = model_name(result.objective.model)
    seen, images = ([], None) if result.data is None else _look(result, coordinate, log)
    numbers = [section("Parameters", _parameters(result)), section("Statistics", _statistics(result))]
    sections = [
        ("Data and model", _pictures_of_data(result, seen, images)),
        ("Groups", groups),
        ("Diagnostics", _diagnostics(result, seen)),
        ("Residuals and convergence", _pictures(result, seen)),
        ("Sweeps", _history(result)),
        ("Plan", f"<pre>{escape(str(result.plan))}</pre>"),
        ("Model", _model(result)),
        ("Data", _data(result)),
        ("Provenance", _provenance(result)),
    ]
    verdict = ("good", "converged") if result.success else ("bad", "NOT CONVERGED")
    head = (
        f'<h1>{escape(name)}</h1><p><strong class="{verdict[0]}">{verdict[1]}</strong>: {escape(result.message)}<br>'
        f'<span class="faint">{several(result.n_points, "point")}, {several(len(result.popt), "parameter")}, '
        f"{several(result.sweeps, 'sweep')} in "
        f"{result.seconds['solve']:.2f} s. Report of {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}</span></p>"
    )
    first, *others = [section(title, content) for title, content in sections]
    beside = f'<div class="beside">{"".join(numbers)}</div>'
    return html_page(f"Fit of {name}", head, first, beside, *others)


# ---------------------------------------------------------------------------------------------------------------------


def model_name(model) -> str:
    """Of a loaded result: what there is left of the model."""
    return function_name(model.f) if hasattr(model, "f") else ".".join(model.name or ["a model without a name"])


def section(title: str, content: str) -> str:
    """Part of a page; empty without content."""
    if not content:
        return ""
    return f"<section><h2>{title}</h2>{content}</section>"


def _look(result, first, log):
    """One pass over the data, along each coordinate, the one that was asked for first; and images where there are any."""
    others = [each.name for each in coordinates(result)]
    chosen = coordinate_of(result, first).name
    which = [first, *(name for name in dict.fromkeys(others) if name != chosen)][:MOST_PANELS]
    several = len(result.data.shape) > 1 or len(others) > 1
    return survey(result, which, plane(result, None) if several else None, log=log)


def _number(value, digits=9) -> str:
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return f"{value:.{digits}g}" if isfinite(value) else NONE if value != value else f"{value:g}"


def _table(head: Iterable[str], rows: Iterable[Iterable], numbers: bool = True) -> str:
    """Rows of texts and numbers; the first column, and all without ``numbers``, are flush left."""

    def cell(tag, k, value):
        kind = ' class="number"' if numbers and k else ""
        return f"<{tag}{kind}>{escape(value if isinstance(value, str) else _number(value))}</{tag}>"

    lines = [[cell("td", k, value) for k, value in enumerate(row)] for row in rows]
    top = [cell("th", k, value) for k, value in enumerate(head)]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in ([top] if top else []) + lines)
    return f'<div class="scroll"><table>{body}</table></div>'


def _parameters(result):
    ends = zip(result.popt, result.perr, result.confidence_intervals(LEVEL), strict=True)
    rows = [
        (name, value, error.replace("+-", "±"), share.strip("()") or NONE, *(measured(end, doubt)[0] for end in interval))
        for (name, value, error, share, _), (_, doubt, interval) in zip(result.params.rows(), ends, strict=False)
    ]  # a crafted file may repeat a name
    head = ["parameter", "value", "error", "relative", f"{LEVEL:.0%} from", "to"]
    if np.isfinite(result.bounds).any():
        head += ["lower bound", "upper bound"]
        rows = [(*row, *map(_bound, ends)) for row, ends in zip(rows, result.bounds.T, strict=False)]
    notes = [each.remark for each in result.params.values()]
    if any(notes):
        head, rows = [*head, ""], [(*row, note) for row, note in zip(rows, notes, strict=True)]
    derived = [(name, value, error.replace("+-", "±"), *rest) for name, value, error, *rest in result.derived.rows()]
    return _table(head, rows) + (_table(["derived", "value", "error", "relative", ""], derived) if derived else "")


def _bound(value: float) -> str:
    return _number(value) if isfinite(value) else "none"


def _statistics(result):
    known = {name.replace("^2", "²"): value for name, value in by_title(result.statistics, result.noise).items()}
    rows = [*known.items(), *((title, getattr(result, name)) for name, title in FACTS.items())]
    return _table([], [(title, _number(value, 6)) for title, value in rows if value or title not in NONE_OF_THEM])


def _diagnostics(result, seen):
    lines = [*result.diagnostics.lines, *(line for each in seen for line in along(each))]
    lines += [str(each) for each in result.damage[:3]]
    if len(result.damage) > 3:
        lines.append(f"{len(result.damage) - 3} more chunks could not be read")
    if result.n_filled:
        lines.append(f"{result.n_filled} absent chunks were read as fill values")
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _pictures_of_data(result, seen, images):
    if result.data is None:
        what = (
            "which belong to the groups: result.local.compute().report(path) has them"
            if hasattr(result, "groups")
            else ("which this result does not hold")
        )
        return f'<p class="faint">Without pictures of the data, {what}.</p>'
    pictures = []
    if images is not None:
        about = f"Means over the points of each bin: {images.names[0]} against {images.names[1]}"
        pictures.append(("wide", about, partial(plots.images, result, seen=images), (1, 3), (9.6, 3.2)))
    for each in seen:
        what = "points" if each.points is not None else f"means in {len(each.x)} bins, with their standard errors"
        about = f"Data ({what}), model and residuals against {each.name}"
        draw = partial(plots.fit, result, residuals=True, seen=each)
        wide = len(seen) == 1
        pictures.append(("wide" if wide else "", about, draw, (2, 1), (8.6, 5.4) if wide else (4.6, 4.0)))
    return _figures(pictures)


def _pictures(result, seen):
    pictures: list[tuple] = [("", "Cost and distance to the optimum by sweep", partial(plots.convergence, result))]
    if seen:
        about = "Residuals and what normal noise gives"
        pictures.insert(0, ("", about, partial(plots.residual_histogram, result, seen=seen[0])))
    if np.isfinite(np.diag(result.correlation)).sum() > 1:
        wide = len(result.popt) > 8 or max(map(len, result.param_names)) > 16
        size = (8.6, 7.6 if len(result.popt) > 8 else 4.4) if wide else SMALL
        pictures += [("wide" if wide else "", "Correlation", partial(plots.correlation, result), (1, 1), size)]
    return _figures(pictures)


def _figures(pictures) -> str:
    return f'<div class="pictures">{"".join(_figure(*each) for each in pictures)}</div>'


def _figure(kind, caption, draw, grid=(1, 1), size=SMALL):
    """A picture as the text of an SVG file within the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "dask_nlsq", "font.size": 9.5}):
        figure = Figure(figsize=size, layout="constrained")
        rows, columns = grid
        draw(figure.subplots(*grid, sharex=True, sharey=columns > 1, height_ratios=plots.PANELS[:rows]))
        figure.align_ylabels()
        file = BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    caption = escape(caption)
    return f'<figure class="{kind}"><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _history(result):
    head = ["sweep", "cost", "reduction", "predicted", "step", "distance", "", "after (s)"]
    read = any(record.read for record in result.history)
    rows = []
    for record in result.history:
        few = [_number(each, 4) for each in (record.actual, record.predicted, record.step_norm, record.distance)]
        verdict = "accepted" if record.accepted else "refused"
        row = [str(record.nfev), record.cost, *few, verdict, f"{record.seconds:.2f}"]
        rows.append(row + ([f"{record.read.gb_per_s:.2f}" if record.read else ""] if read else []))
    table = _table(head + ["GB/s"] * read, rows)
    if len(rows) < LONG:
        return table
    return f"<details><summary>{len(rows)} sweeps</summary>{table}</details>"


def _model(result):
    if not hasattr(result.objective.model, "f"):
        return ""
    f = own_function(result.objective.model.f)
    try:
        return f"<pre>{escape(textwrap.dedent(inspect.getsource(f)))}</pre>"
    except (OSError, TypeError):  # not in a file, or an object
        return f"<pre>{escape(repr(f))}\n\n{escape(inspect.getdoc(f) or '')}</pre>"


def _data(result):
    if result.data is None:
        return ""
    problem, _ = data_of(result)
    layouts = problem.preparation.layouts
    names = ["ydata", "sigma", *["mask"] * (layouts.mask is not None)]
    names += ["xdata"] if len(layouts.x) == 1 else [f"xdata[{k}]" for k in range(len(layouts.x))]
    rows = []
    for name, operand in zip(names, problem.operands, strict=True):
        if operand.size == 1 and name in ("sigma", "mask"):
            continue  # what stands for none, or a number
        chunks = getattr(operand, "chunks", None)
        cut = "in memory"
        if chunks is not None:
            largest = " x ".join(str(max(sizes)) for sizes in chunks)
            cut = f"Dask, {prod(len(sizes) for sizes in chunks):,} of up to {largest}"
        shape = " x ".join(map(str, operand.shape))
        rows.append((name, shape, str(operand.dtype), cut, ", ".join(_places(operand))))
    return _table(["", "shape", "type", "chunks", "store"], rows, numbers=False)


def _places(operand) -> list[str]:
    """Stores that the graph of a Dask array reads, without what a URL may have of passwords."""
    graph = getattr(operand, "dask", {})
    values = (getattr(node, "value", node) for node in graph.values())
    arrays = (getattr(value, "array", value) for value in values)
    found = dict.fromkeys(address(array) for array in arrays if hasattr(array, "store_path"))
    return [re.sub(r"//[^/@]*@", "//", place) for place in found]


def _provenance(result):
    objective = result.objective
    loss = f"{objective.loss}, f_scale {objective.f_scale:g}"
    loss = 'linear, sigma="poisson"' if result.noise.reweighted else loss
    rows = [
        ("solution", f"{result.strategy}; reduction {result.reduction}; derivatives by {result.jac_mode}"),
        ("loss", loss),
        ("time", ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items())),
        *where_written(),
    ]
    return _table([], rows, numbers=False)
