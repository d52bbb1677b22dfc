"""A fit as text, and as a table for notebooks."""

from html import escape

import numpy as np

from ..base.text import several, table
from ..model.params import Params
from .report import model_name
from .statistics import by_title, largest_correlations

MOST_CORRELATIONS = 5  # in a summary


def summary(result, full: bool) -> str:
    """How the solver got there, statistics, parameters with standard errors, largest correlations."""
    points = several(result.n_points, "point")
    points += f", {result.n_masked:,} masked" if result.n_masked else ""
    points += f", {result.n_omitted:,} omitted (not finite)" if result.n_omitted else ""
    resumed = f", resumed after {result.resumed:,}," if result.resumed else ""
    near = f"; {result.distance:.1e} standard errors from the optimum of the quadratic model"
    lines = [
        f"{_verdict(result)}: {result.message}",
        f"{points}; {several(len(result.popt), 'parameter')}; cost {result.cost:.6g}"
        + near * bool(np.isfinite(result.distance)),
        f"{several(result.sweeps, 'sweep')}{resumed} in {result.seconds['solve']:.2f} s, "
        f"after {result.seconds['load']:.2f} s of preparation;"
        f' strategy "{result.strategy}"; reduction "{result.reduction}"; condition {result.condition:.1e}',
    ]
    if result.damage:
        lines.append(f"{len(result.damage)} damaged or absent chunks left out, first {result.damage[0].key}")
    if result.n_filled:
        lines.append(f"{result.n_filled} absent chunks read as fill values")
    lines += [known] if (known := _statistics(result)) else []
    rows = result.params.rows(full) + result.derived.rows(full)
    lines += ["  " + line.rstrip() for line in table(rows)]
    if pairs := largest_correlations(result.correlation, MOST_CORRELATIONS):
        names = result.param_names
        lines.append("correlations: " + "; ".join(f"{names[j]}, {names[i]} {value:+.3f}" for i, j, value in pairs))
    return "\n".join(lines)


def html(result) -> str:
    """Heading, status, a table of the parameters, statistics and diagnostics."""
    parameters = Params(*result.params.values(), *result.derived.values()).to_html()
    lines = "".join(f"<li>{escape(line)}</li>" for line in result.diagnostics.lines)
    return (
        f"<h4>Fit of {escape(model_name(result.objective.model))}</h4>"
        f"<p><strong>{_verdict(result)}</strong>: {escape(result.message)}</p>{parameters}"
        f"<p>{several(result.n_points, 'point')}; {escape(_statistics(result).replace('^2', '²'))}</p><ul>{lines}</ul>"
    )


def _verdict(result) -> str:
    return "converged" if result.success else "NOT CONVERGED"


def _statistics(result) -> str:
    """Those that exist, without what corrects them for few points."""
    found = by_title(result.statistics, result.noise)
    return "; ".join(f"{name} {value:.6g}" for name, value in found.items() if name not in ("adjusted R^2", "AICc"))
