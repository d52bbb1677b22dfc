"""The data of a fit at the door: opened, aligned, admitted; and what is said where a fit of them cannot go on."""

import logging
from math import prod
from typing import Any

import numpy as np

from ..kernels.checks import check_model
from ..memory.machine import active_client
from ..model.function import FixedParameters, Model, ModelError, ModelShapeError, function_name, not_of_any_length
from ..model.ready import ReadyModel
from .align import Problem, build_problem, build_whitened
from .arrays import apart, decoded, stacked
from .cf import AS_STORED
from .chunks import LARGEST, SAMPLE_POINTS, Census
from .store import Opened, Policy, is_stored, n_stored, open_all

WHOLE_LIMIT = 10_000  # points up to which a model that needs all points at once is evaluated so

logger = logging.getLogger("dask_nlsq")


def count_points(ydata) -> int:
    if is_stored(ydata):
        return n_stored(ydata)
    ydata = stacked("ydata", ydata)
    return ydata.size if hasattr(ydata, "size") else np.size(ydata)


def open_data(
    data: dict[str, Any],
    policy: Policy,
    mask_values,
    valid_range,
    decode_cf: bool,
    loss: str,
    *,
    look: bool = True,
    masks: bool = False,
):
    """The data with stored arrays opened, these arrays, and what `build_problem` has to know of both.

    With ``masks`` chunks that are to be left out come as masked ones.

    Raises
    ------
    ValueError
        Attributes that cannot be understood; scaled values where counts are needed.
    """
    if mask_values is None:
        in_file = is_stored(data["ydata"]) or hasattr(data["ydata"], "file")  # of h5py
        mask_values = ["largest"] if in_file else []
    data, opened = open_all(policy, look, bool(decode_cf), masks, **data)
    stored = [each for one in opened for each in one.stored]
    said = [(each.name, each.url, how) for one in opened for each, how in zip(one.stored, one.decodings, strict=True)]
    of_y = next((one for one in opened if one.array is data["ydata"]), None)
    decoding = AS_STORED if of_y is None else of_y.decoding
    if of_y is not None:
        _check_alike(of_y, mask_values)

    def door(name, value):
        """Lists of lazy arrays as one, and attributes of h5py's data sets applied."""
        nonlocal decoding
        if isinstance(value, tuple) and name == "xdata":
            return tuple(door(f"{name}[{k}]", each) for k, each in enumerate(value))
        found, how = decoded(name, value, decode_cf)
        said.append((name, getattr(value, "name", ""), how))
        if name == "ydata" and how is not AS_STORED:  # kernels decode it
            decoding, found = how, value
        return found

    data = {name: door(name, value) for name, value in data.items()}
    if loss == "poisson" and (
        scaled := next((how for name, _, how in said if name.startswith("ydata") and how.scaled), None)
    ):
        raise ValueError(
            f"loss='poisson' and sigma='poisson' are for counts, and `ydata` is scaled ({scaled}): fit it with sigma=, or, "
            "where the stored numbers are the counts, say decode_cf=False"
        )
    lines = tuple(f"`{name}` ({place}): {how}" for name, place, how in said if how is not AS_STORED)
    for line in lines:
        logger.info("%s (decode_cf=False leaves values as they are stored)", line)
    rules = dict(hides=policy.masks and bool(stored), sentinels=(mask_values, valid_range), decoding=decoding)
    return data, stored, rules | dict(decoded=lines, decode_cf=bool(decode_cf))


def _check_alike(opened: Opened, mask_values) -> None:
    """Stored values that stand for no data are looked for in all arrays of a list, so they must mean the same."""
    dtypes = [each.dtype for each in opened.stored]
    packed_alike = opened.decoding is not AS_STORED or all(how is AS_STORED for how in opened.decodings)
    if mask_values == ["largest"]:
        unclear = any(t.kind == "u" and t.itemsize > 1 for t in dtypes) and (len(set(dtypes)) > 1 or not packed_alike)
    else:
        unclear = np.size(mask_values) > 0 and not packed_alike
    if unclear:
        raise ValueError(
            f"`ydata` is a list of arrays that differ in dtype or packing ({', '.join(map(str, dict.fromkeys(dtypes)))}), "
            "so that it is not clear which of their values stand for no data: say mask_values=(), and leave points out with "
            "mask="
        )


def align_data(model: Model, n_params: int, xdata, ydata, sigma, mask, strategy, rules: dict[str, Any]) -> Problem:
    y_size = count_points(ydata)
    if sigma is not None and np.ndim(sigma) == 2 and np.shape(sigma) == (y_size, y_size) != np.shape(ydata) and y_size > 1:
        covariance_of_y, hidden = apart("sigma", sigma)
        if hidden is not None and np.any(hidden):
            raise ValueError(
                "`sigma` is a covariance matrix with masked elements: leave points out with mask=, and fill them"
            )
        covariance_of_y = np.asarray(covariance_of_y, dtype=np.float64)
        problem = build_whitened(xdata, ydata, covariance_of_y, mask, **rules)
        check_model(model, problem.rules.layouts, problem.n_points, n_params)
        return problem
    split = strategy == "chunked" and active_client() is not None
    arguments = dict(sigma=sigma, mask=mask, split=split) | rules
    problem = build_problem(xdata, ydata, **arguments, whole=xdata is None)
    ready = isinstance(model.f.f if isinstance(model.f, FixedParameters) else model.f, ReadyModel)
    if ready and problem.rules.layouts.x_kind != "single":
        raise ValueError(f"`xdata` must be one array for the model {function_name(model.f)}, which has one coordinate")
    if problem.rules.whole:
        check_model(model, problem.rules.layouts, problem.n_points, n_params)
        return problem
    n = SAMPLE_POINTS if problem.n_points != SAMPLE_POINTS else SAMPLE_POINTS + 1
    try:
        check_model(model, problem.rules.layouts, n, n_params)
    except (ModelError, ModelShapeError):
        if problem.lazy or problem.n_points > WHOLE_LIMIT:
            raise
    except (TypeError, ValueError) as err:
        if problem.lazy or problem.n_points > WHOLE_LIMIT:
            raise not_of_any_length(model, n, err) from None
    else:
        return problem
    # a model that closes over an array as long as the data works on all points only
    check_model(model, problem.rules.layouts, problem.n_points, n_params)
    return build_problem(xdata, ydata, **arguments, whole=True)


def admit_data(censuses: list[Census], problem: Problem, n_params) -> tuple[int, int, int]:
    """Points used, masked and omitted; an error where values are not as they must be."""
    n_chunks = prod(len(sizes) for sizes in problem.chunks)
    if not problem.rules.omit:
        for name in ("ydata", "xdata", "sigma"):
            bad = [(census.index, count) for census in censuses if (count := census.not_finite.get(name, 0))]
            if bad:
                total = sum(count for _, count in bad)
                where = f", first in block {bad[0][0]} of {n_chunks}" if n_chunks > 1 else ""
                raise ValueError(
                    f"The input contains nan or infinity: {total} of the values of `{name}`{where}. "
                    'nan_policy="omit" leaves these points out, mask= leaves out those that you name'
                )
    for census in censuses:
        where = f" (first in block {census.index})" if n_chunks > 1 else ""
        if census.n_sigma_not_positive:
            raise ValueError(
                f"`sigma` must be positive: {census.n_sigma_not_positive} values are zero or negative{where}; use mask= to "
                "leave points out"
            )
        if census.too_large:
            raise ValueError(
                f"`ydata` has values too large to be squared: {census.too_large:g}{where} is more than {LARGEST:g} times "
                "sigma. mask=, mask_values= or valid_range= leaves points out; else give ydata and sigma in other units"
            )
        if census.n_negative:
            raise ValueError(
                f"loss='poisson' is for counts: {census.n_negative} values of `ydata` are negative{where}; use mask= to "
                "leave points out, and give counts before any background is subtracted"
            )
    n_masked, n_omitted = (sum(getattr(c, name) for c in censuses) for name in ("n_masked", "n_omitted"))
    n_points = problem.n_points - n_masked - n_omitted
    n_masked += problem.n_dropped
    if n_points == 0:
        raise ValueError(f"no data: all {problem.n_points} points are masked or omitted (mask: true leaves a point out)")
    if n_points < n_params:
        raise TypeError(too_few(n_params, n_points, n_masked + n_omitted))
    return n_points, n_masked, n_omitted


def too_few(n_params, n_points, left_out=0):
    why = f" ({left_out} more are masked or omitted; a true mask value leaves a point out)" if left_out else ""
    return f"The number of func parameters={n_params} must not exceed the number of data points={n_points}{why}"
