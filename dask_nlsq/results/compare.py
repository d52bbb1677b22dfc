"""Compare fits of the same points: information criteria, and a test whether the larger of two nested models is needed.

With the chi-square X and the number k of fitted parameters of two least-squares fits, and n points [1]_:

    F = (X1 - X2) / (k2 - k1) / (X2 / (n - k2))      F distribution of k2 - k1 and n - k2

For a Poisson likelihood the deviance decreases by X1 - X2, which has the chi-square distribution of k2 - k1 [2]_. Both hold
if the smaller model is true, and no parameter is at a bound.

References
----------
.. [1] P. R. Bevington, D. K. Robinson, "Data Reduction and Error Analysis for the Physical Sciences", 3rd ed., section 11.4.
.. [2] S. S. Wilks, "The large-sample distribution of the likelihood ratio for testing composite hypotheses", Ann. Math.
       Statist. 9 (1938) 60-62.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import scipy

from ..base.text import html_table, numbered, table
from ..model.function import function_name, own_function
from ..model.ready import ReadyModel
from ..options import Noise

ALIKE = 1e-9  # relative, of sums over the same points in another order
CRITERIA = {"aic": "AIC", "aicc": "AICc", "bic": "BIC"}


class Compared(NamedTuple):
    """One of the compared fits."""

    name: str
    n_params: int  # fitted
    chi_square: float  # or deviance
    reduced_chi_square: float
    aic: float
    aicc: float
    bic: float
    within: str  # name of the largest model that is nested in this one; empty where none is
    statistic: float  # F, or the deviance by which that one is worse; nan without one
    p: float  # probability of such a statistic where the model within holds
    success: bool


class Comparison(NamedTuple):
    """The result of `compare`; prints as a table."""

    rows: tuple[Compared, ...]  # as they were given
    likelihood: bool  # of counts

    def best(self, criterion: str = "bic") -> str:
        """Name of the fit with the smallest "aic", "aicc" or "bic"."""
        if criterion not in CRITERIA:
            raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, not {criterion!r}")
        return min(self.rows, key=lambda row: getattr(row, criterion)).name

    def cells(self) -> list[tuple[str, ...]]:
        """Of the table, the head among them; each criterion minus its smallest value."""
        chi, test = ("deviance", "chi-square") if self.likelihood else ("chi-square", "F")
        least = {name: min(getattr(row, name) for row in self.rows) for name in CRITERIA}
        found = [("", "parameters", chi, f"reduced {chi}", *CRITERIA.values(), test, "p", "")]
        for row in self.rows:
            above = (f"+{getattr(row, name) - least[name]:.1f}" for name in CRITERIA)
            numbers = f"{row.n_params}", f"{row.chi_square:.6g}", f"{row.reduced_chi_square:.4g}", *above
            tested = (f"{row.statistic:.4g}", f"{row.p:.2g}") if row.within else ("", "")
            remark = "; ".join(["against " + row.within] * bool(row.within) + ["not converged"] * (not row.success))
            found.append((row.name, *numbers, *tested, remark))
        return found

    def __repr__(self):
        return "\n".join(table(self.cells(), "<" + 8 * ">"))

    def _repr_html_(self):
        head, *rows = self.cells()
        return html_table(head, rows)


def compare(*results: Any, nested: bool | None = None, **named: Any) -> Comparison:
    """Compare fits of different models to the same points.

    Parameters
    ----------
    *results, **named : FitResult or GroupResult
        Two or more; ``compare(flat=one, sloped=two)`` names them, others are called like their models.
    nested : bool, optional
        Whether each model is a special case of those with more parameters. None: yes if the larger one has all of its fitted
        parameters, by name, or all of its terms if both are ready models or sums of them.

    Returns
    -------
    Comparison
        AIC, AICc and BIC of each, and the F test (for counts the deviance test) against the largest model within it.

    Raises
    ------
    TypeError, ValueError
        Fewer than two results, fits of different points, of different noise, or without a likelihood.

    See Also
    --------
    hold : Load the data once for all models.

    Examples
    --------
    >>> import numpy as np
    >>> from dask_nlsq import compare, curve_fit
    >>> from dask_nlsq.models import line, polynomial
    >>> x = np.linspace(0, 1, 200)
    >>> y = x**2 + np.random.default_rng(0).normal(0, 0.05, x.size)
    >>> compare(curve_fit(line, x, y), curve_fit(polynomial(2), x, y)).best()
    'polynomial(2)'
    """
    given = [getattr(each, "shared", each) for each in (*results, *named.values())]
    if len(given) < 2 or not all(hasattr(each, "statistics") and hasattr(each, "totals") for each in given):
        raise TypeError("compare needs two results or more, as compare(curve_fit(f, x, y), curve_fit(g, x, y))")
    names = [*numbered([_model_name(each) for each in given[: len(results)]], " "), *named]
    if twice := [name for name in named if names.count(name) > 1]:
        raise ValueError(f"two fits have the name {twice[0]!r}: name them differently")
    fits = dict(zip(names, given, strict=True))
    first, *others = fits
    for name in others:
        _check_alike(first, fits[first], name, fits[name])
    return Comparison(tuple(_compared(name, fits, nested) for name in fits), fits[first].noise.likelihood)


def _n_params(fit) -> int:
    """That were fitted, of groups with the locals."""
    return fit.n_points - fit.dof


def _model_name(fit) -> str:
    model = fit.objective.model
    return function_name(model.f) if hasattr(model, "f") else (model.name or ["model"])[-1]


def _in_words(noise: Noise) -> str:
    """The arguments that have led to it."""
    if noise.reweighted:
        return "sigma='poisson'"
    kinds = {None: "a sigma for each point", 1.0: "no sigma"}
    sigma = "" if noise.likelihood else f", {kinds.get(noise.sigma, f'sigma={noise.sigma}')}"
    return f"loss={noise.loss!r}{sigma}" + ", absolute_sigma=True" * (noise.absolute and not noise.likelihood)


def _check_alike(first: str, one, name: str, other) -> None:
    """An error where two fits are of other points, or of other noise."""
    if one.noise != other.noise:
        raise ValueError(
            f"{first} and {name} differ in loss or sigma: {first} has {_in_words(one.noise)}, {name} has "
            f"{_in_words(other.noise)}. Make them the same"
        )
    for which, fit in ((first, one), (name, other)):
        if np.isnan(fit.aic):
            raise ValueError(
                f"{which} has no AIC: least squares (loss='linear') above a cost of 0 and counts (loss='poisson') have one"
            )
    if one.n_points != other.n_points:
        raise ValueError(f"{first} and {name} are fits of different points: {one.n_points:,} and {other.n_points:,} of them")
    weight, squares = one.totals.weight, one.totals.squares
    for what, size in dict(weight=weight, weighted=np.sqrt(weight * squares), squares=squares).items():
        a, b = getattr(one.totals, what), getattr(other.totals, what)
        if abs(a - b) > ALIKE * size:
            raise ValueError(
                f"{first} and {name} are fits of different points, or with another sigma: sums over all of their data are "
                f"{a:.9g} and {b:.9g}"
            )


def _compared(name: str, fits: dict[str, Any], nested: bool | None) -> Compared:
    fit, found = fits[name], fits[name].statistics
    k = _n_params(fit)
    smaller = [each for each, other in fits.items() if _n_params(other) < k]
    inner = [each for each in smaller if (_is_within(fits[each], fit) if nested is None else nested)]
    within = max(inner, key=lambda each: _n_params(fits[each]), default="")
    statistic = p = np.nan
    if within:
        gained, dk = fits[within].chi_square - fit.chi_square, k - _n_params(fits[within])
        if fit.noise.likelihood:
            statistic, p = gained, scipy.special.chdtrc(dk, max(gained, 0.0))
        elif fit.dof > 0:
            statistic = gained / dk / fit.reduced_chi_square
            p = scipy.special.fdtrc(dk, fit.dof, max(statistic, 0.0))
    numbers = found.chi_square, found.reduced_chi_square, found.aic, found.aicc, found.bic
    return Compared(name, k, *numbers, within, float(statistic), float(p), fit.success)


def _is_within(small, large) -> bool:
    """Whether a model is a special case of another, by the names of parameters or terms."""
    if not (large.fixed.items() <= small.fixed.items() and large.tied.items() <= small.tied.items()):
        return False  # it holds what the other does not
    models = [own_function(getattr(each.objective.model, "f", None)) for each in (small, large)]
    if all(isinstance(each, ReadyModel) for each in models):
        terms = [Counter(term.kind for term in each.terms) for each in models]
        if terms[0] != terms[1] or models[0].tree != models[1].tree:
            return all(each.is_sum for each in models) and terms[0] <= terms[1]
    fitted = [{each.param_names[k] for k in each.free} for each in (small, large)]
    return fitted[0] <= fitted[1]
