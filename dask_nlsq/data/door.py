"""The data of a fit at the door: opened, aligned, admitted; and what is said where a fit of them cannot go on."""

import logging
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ..base.text import several
from ..base.warn import warn
from ..kernels.blocks import Layouts
from ..kernels.checks import check_model
from ..memory.machine import active_client
from ..model.function import Model, ModelError, ModelShapeError, function_name, not_of_any_length, own_function
from ..model.ready import ReadyModel
from .align import Data, build_data
from .arrays import as_array, decoded, stacked
from .cf import AS_STORED
from .chunks import LARGEST, SAMPLE_POINTS, Census
from .sources import check_sources, holds_stored_values
from .store import Opened, Policy, is_stored, n_stored, open_all

WHOLE_LIMIT = 10_000  # points up to which a model that needs all points at once is evaluated so

logger = logging.getLogger("dask_nlsq")


def count_points(ydata) -> int:
    if is_stored(ydata):
        return n_stored(ydata)
    ydata = stacked("ydata", ydata)
    return ydata.size if hasattr(ydata, "size") else as_array("ydata", ydata).size


def open_data(data: dict[str, Any], call, masks: bool = False):
    """The data with stored arrays opened, these arrays, and what `build_data` has to know of both.

    ``call`` has the arguments ``on_bad_chunk`` to ``decode_cf`` of `dask_nlsq.curve_fit`. With ``masks`` chunks that are to
    be left out come as masked ones.

    Raises
    ------
    ValueError
        Attributes that cannot be understood, options for chunks that cannot be applied.
    BadChunkError, MissingChunksError
        Chunks that are damaged or absent, as far as a look at their keys shows it.
    """
    policy, mask_values, given = Policy(call.on_bad_chunk, call.missing_chunks), sentinels(call, data["ydata"]), data
    data, opened = open_all(policy, call.decode_cf, masks, **given)
    check_sources(policy, given, len(opened))
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
        found, how = decoded(name, value, call.decode_cf)
        said.append((name, getattr(value, "name", ""), how))
        if name == "ydata" and how is not AS_STORED:  # kernels decode it
            decoding, found = how, value
        return found

    data = {name: door(name, value) for name, value in data.items()}
    lines = tuple(f"`{name}` ({place}): {how}" for name, place, how in said if how is not AS_STORED)
    for line in lines:
        logger.info("%s (decode_cf=False leaves values as they are stored)", line)
    scaled = next((str(how) for name, _, how in said if name.startswith("ydata") and how.scaled), "")
    values = dict(hides=policy.masks and bool(stored), sentinels=(mask_values, call.valid_range), decoding=decoding)
    return data, stored, values | dict(decoded=lines, scaled=scaled, decode_cf=call.decode_cf)


def sentinels(call, ydata):
    """``mask_values``, by default what marks invalid values in files: "largest" is that of their dtype."""
    if call.mask_values is not None:
        return call.mask_values
    return ["largest"] if is_stored(ydata) or holds_stored_values(ydata) else []


def _check_alike(opened: Opened, mask_values) -> None:
    """All arrays of a list are searched for the same invalid values, so these must mean the same."""
    dtypes = [each.dtype for each in opened.stored]
    packed_alike = opened.decoding is not AS_STORED or all(how is AS_STORED for how in opened.decodings)
    if mask_values == ["largest"]:
        unclear = any(t.kind == "u" and t.itemsize > 1 for t in dtypes) and (len(set(dtypes)) > 1 or not packed_alike)
    else:
        unclear = np.size(mask_values) > 0 and not packed_alike
    if unclear:
        raise ValueError(
            f"`ydata` is a list of arrays that differ in dtype or packing ({', '.join(map(str, dict.fromkeys(dtypes)))}), "
            "so it is unclear which of their values are invalid: give mask_values=(), and leave points out with "
            "mask="
        )


def align_data(data: dict[str, Any], strategy: str, values: dict[str, Any], whole: bool = False) -> Data:
    """Align what `open_data` has opened; ``whole`` if all points are needed at once. Does not read data.

    Raises
    ------
    TypeError, ValueError
        What `build_data` raises.
    """
    ydata, sigma, y_size = data["ydata"], data["sigma"], count_points(data["ydata"])
    if isinstance(sigma, (list, tuple)):
        sigma = data["sigma"] = as_array("sigma", sigma)
    if sigma is not None and np.ndim(sigma) == 2 and np.shape(sigma) == (y_size, y_size) != np.shape(ydata) and y_size > 1:
        aligned = build_data(data["xdata"], ydata, None, data["mask"], **values, whole=True)
        return replace(aligned, covariance=as_array("sigma", sigma))
    split = strategy == "chunked" and active_client() is not None
    return build_data(**data, **values, split=split, whole=whole or data["xdata"] is None)


def needs_all_points(model: Model, n_params: int, data: Data) -> bool:
    """Whether the model can only be evaluated on all points at once, as one that closes over an array of their length.

    Raises
    ------
    TypeError
        Fewer points than parameters, and what `check_model` raises.
    ValueError
        Coordinates that a ready model does not have.
    """
    if data.n_points < n_params:
        raise TypeError(too_few(n_params, data.n_points))
    layouts, whole = data.preparation.layouts, data.preparation.whole
    ready = isinstance(own_function(model.f), ReadyModel)
    if ready and layouts.x_kind != "single":
        raise ValueError(f"`xdata` must be one array for the model {function_name(model.f)}, which has one coordinate")
    if not whole:
        n = SAMPLE_POINTS if data.n_points != SAMPLE_POINTS else SAMPLE_POINTS + 1
        small = not data.lazy and data.n_points <= WHOLE_LIMIT
        try:
            try_model(model, layouts, n, n_params, data.shape)
            return False
        except (ModelError, ModelShapeError):
            if not small:
                raise
        except (TypeError, ValueError) as err:
            if not small:
                raise not_of_any_length(model, n, err) from None
    try_model(model, layouts, data.n_points, n_params, data.shape)
    return not whole


def try_model(model: Model, layouts: Layouts, n: int, n_params: int, shape: tuple[int, ...]) -> None:
    """`check_model`, whose errors say what xdata was taken for; ``shape`` is that of all points."""
    try:
        check_model(model, layouts, n, n_params)
    except ModelShapeError as err:
        if layouts.x_kind != "stacked":
            raise
        lead = layouts.x_lead
        taken = f"`xdata` of shape {(*lead, *shape)} was taken as {prod(lead)} coordinates of points of shape {shape}"
        raise ModelShapeError(f"{err}. {taken}, and the model gets them as an array of shape {(*lead, n)}") from None
    except (TypeError, AttributeError) as err:
        is_tuple = layouts.x_kind == "tuple" and "'tuple'" in str(err)
        if not isinstance(err, ModelError) and "incompatible shapes" in str(err) and n == prod(shape):
            why = f"arrays of different lengths ({str(err).rstrip('.')})"
            raise ModelError(
                f"the model {function_name(model.f)}, tried on {n:,} points, combines {why}: data are fitted in blocks, so "
                "pass arrays that belong to the points in `xdata`, as in `(x, background)`"
            ) from None
        if isinstance(err, ModelError) or not (is_tuple or layouts.x_kind == "none"):
            raise
        if is_tuple:
            raise ModelError(
                f"the model {function_name(model.f)} gets a tuple of arrays for x, as `xdata` is a tuple ({err}): pass an "
                "array, or unpack it in the model, as in `x, y = xy`"
            ) from None
        raise ModelError(
            f"the model {function_name(model.f)} gets None for x, as `xdata` is None ({err}): pass xdata. None is for "
            "models that need no x; with an xarray `ydata` it stands for the coordinates"
        ) from None


def refuse_scaled(scaled: str) -> None:
    """An error where y is not counts but what scale and offset have made of them."""
    if scaled:
        raise ValueError(
            f"loss='poisson' and sigma='poisson' are for counts, and `ydata` is scaled ({scaled}): fit it with sigma=, or, "
            "where the stored numbers are the counts, say decode_cf=False"
        )


def admit_data(census: Census, problem: Data, counts: bool, n_params: int) -> tuple[int, int, int]:
    """Points used, masked and omitted; an error where values are not as they must be, ``counts`` among them not negative."""
    chunked = prod(len(sizes) for sizes in problem.chunks) > 1
    faults = census.faults

    def where(fault):
        return f" (first in block {fault.index})" if chunked else ""

    for name in ("ydata", "xdata", "sigma"):
        if name in faults and not problem.preparation.policy.omit:
            at = f", first in block {faults[name].index} of {prod(map(len, problem.chunks))}" if chunked else ""
            raise ValueError(
                f"The input contains nan or infinity: {faults[name].count} of the values of `{name}`{at}. "
                'nan_policy="omit" leaves these points out, mask= leaves out those that you name'
            )
    if fault := faults.get("sigma <= 0"):
        raise ValueError(
            f"`sigma` must be positive: {several(fault.count, 'value')} {'is' if fault.count == 1 else 'are'} zero or "
            f"negative{where(fault)}; use mask= to leave points out"
        )
    if fault := faults.get("too large"):
        raise ValueError(
            f"`ydata` has values too large to be squared: {fault.value:g}{where(fault)} is more than {LARGEST:g} times "
            "sigma. mask=, mask_values= or valid_range= leaves points out; else give ydata and sigma in other units"
        )
    if counts and (fault := faults.get("ydata < 0")):
        raise ValueError(
            f"loss='poisson' is for counts: `ydata` has {several(fault.count, 'negative value')}{where(fault)}; use mask= "
            "to leave points out, and give counts before any background is subtracted"
        )
    if counts and "ydata not whole" in faults:
        warn(NOT_COUNTS, UserWarning)
    if census.n_used == 0:
        left_out = "masked, outside `xrange` or omitted (mask: true leaves a point out)"
        raise ValueError(f"no data: all {problem.n_points} points are {left_out}")
    if census.n_used < n_params:
        raise TypeError(too_few(n_params, census.n_used, census.n_masked + problem.n_dropped + census.n_omitted))
    return census.n_used, census.n_masked + problem.n_dropped, census.n_omitted


NOT_COUNTS = (
    "`ydata` has values that are not whole numbers, but errors from loss='poisson' and sigma='poisson' are right for counts "
    "only: undo what they were divided by or multiplied with, or give sigma= instead"
)


def too_few(n_params, n_points, left_out=0):
    why = f" ({left_out} more are masked or omitted; a true mask value leaves a point out)" if left_out else ""
    return f"The number of func parameters={n_params} must not exceed the number of data points={n_points}{why}"
