"""One page about maps of fits, to keep beside the data: HTML that needs nothing else, pictures included."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from ..base.text import html_table
from ..kernels.lanes import MapStatus, succeeded
from ..results.plots import PANELS
from ..results.report import html_page, section, where_written, written
from . import pictures

GOOD = (25, 50, 75)  # percentiles of the reduced chi-square at which good spectra are shown
MOST_FAILED = 3  # statuses without success of which a spectrum is shown
STATES = ("status", "chi2", "distance")
PICTURES = '<div class="pictures">{}</div>'
OF_SPECTRA = (4.4, 3.6)  # inches


def report(found, path: str | Path) -> Path:
    """Write one page about maps: statuses, maps, histograms, some good and some bad spectra, plan, and where it comes from.

    The pictures of spectra read the chunks that have them. Maps that were loaded without their data get a page without.

    Parameters
    ----------
    found : MapResult
        Lazy maps are computed, and stored ones read, for the page alone, up to 4 million pixels.
    path : path
        Of an HTML file; one that is there is replaced when all is done.

    Raises
    ------
    FileNotFoundError
        Where the directory of ``path`` does not exist.
    ValueError
        As `dask_nlsq.plots.maps`.
    ModuleNotFoundError
        Without matplotlib.
    """
    return written(path, lambda: page(found.drawable()))


def page(found) -> str:
    """The HTML of `report`, of computed maps."""
    names = [*found.param_names, *found.derived_names]
    good, n = int(np.sum(found.success)), found.status.size
    title = f"Maps of {dict(found.origin)['model']}"
    head = (
        f"<h1>{escape(title)}</h1><p>{escape(found.heading)}<br>"
        f"<strong>{good:,} of {n:,} {found.word}s converged</strong> ({good / max(n, 1):.1%})<br>"
        f'<span class="faint">Report of {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}</span></p>'
    )
    sections = [
        ("Parameters", found.tables()),
        ("Maps", PICTURES.format(_figure(found, names, pictures.maps) + _figure(found, STATES, pictures.maps))),
        ("Histograms", PICTURES.format(_figure(found, names, pictures.histograms)) if good else ""),
        ("Spectra", _spectra(found)),
        ("Provenance", _rows([*found.origin, *where_written()])),
    ]
    return html_page(title, head, *(section(*each) for each in sections))


def distribution(found, names) -> str:
    """HTML about the groups of a fit, ``names`` their own parameters: statuses, medians and histograms."""
    try:
        seen = found.drawable()
    except ValueError as too_large:
        return f"<p>{escape(str(too_large))}</p>"
    drawn = [name for name, *_ in seen.medians(names)]
    return f"{seen.tables(names)}<br>" + (PICTURES.format(_figure(seen, drawn, pictures.histograms)) if drawn else "")


def _figure(found, names, draw) -> str:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(found, names, pictures.panels(figure, len(names), found.axes))
    return f'<figure class="wide">{pictures.embedded(figure, ", ".join(names))}</figure>'


def _spectra(found) -> str:
    if not hasattr(found, "spectrum"):
        return '<p class="faint">Without spectra: these maps were loaded without their data.</p>'
    return PICTURES.format("".join(_spectrum(found, *each) for each in examples(found)))


def _spectrum(found, place, why) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    seen = found.spectrum(*place)
    with rc_context({"font.size": 8}):
        figure = Figure(figsize=OF_SPECTRA, layout="constrained")
        seen.plot(figure.subplots(2, 1, sharex=True, height_ratios=PANELS))
        figure.align_ylabels()
        return f"<figure>{pictures.embedded(figure, seen.title)}<figcaption>{escape(why)}</figcaption></figure>"


def examples(found) -> list[tuple[tuple[int, ...], str]]:
    """Pixels that show how well the model fits, and how it fails; and why each was chosen."""
    status, dof = found.status, np.maximum(found.n_points - len(found.param_names), 1)
    reduced = np.where(succeeded(status), found.chi2 / dof, np.nan)
    chosen: dict[tuple[int, ...], str] = {}
    if some := int(np.isfinite(reduced).sum()):
        order = np.argsort(reduced, axis=None)[:some]  # NaN is last
        ranks = [(percent, order[(some - 1) * percent // 100]) for percent in (*GOOD, 100)]
        for percent, k in ranks:
            what = "the largest of all" if percent == 100 else f"{percent} % of the {found.word}s have less"
            place = tuple(map(int, np.unravel_index(k, status.shape)))
            chosen.setdefault(place, f"chi-square / degrees of freedom = {reduced[place]:.4g}: {what}")
    fitted = ~np.isin(status, [MapStatus.MASKED, MapStatus.TOO_FEW_POINTS, MapStatus.NOT_FITTED_YET])
    failed = np.unique(status[~succeeded(status) & fitted])
    for code in failed[:MOST_FAILED]:
        places = np.argwhere(status == code)
        chosen[tuple(map(int, places[len(places) // 2]))] = f"{pictures.status_name(code)}: " + (
            f"one of {len(places):,} {found.word}s" if len(places) > 1 else f"the only {found.word}"
        )
    return list(chosen.items())


_rows = partial(html_table, ("", ""))
