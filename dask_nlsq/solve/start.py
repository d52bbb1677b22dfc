"""The start of a fit: checked on a few points, guessed by a ready model."""

import numpy as np

from ..data.chunks import Chunk
from ..data.sample import pick
from ..engine.sweep import Sweep
from ..kernels.checks import check_jac, check_pointwise
from ..model.function import Model, function_name
from ..model.starts import guessed

GUESS_POINTS = 2048  # from which a ready model guesses its start
GUESS_RUNS = 8  # runs of chunks, at least, that are read for it where the data are not held


def check_start(sweep: Sweep, model: Model, names, start, lower, upper) -> None:
    preparation, sample = sweep.data.preparation, sweep.sample
    if not preparation.whole:
        elsewhere = np.clip(start + 0.1 * np.maximum(abs(start), 1) * (-1.0) ** np.arange(len(start)), lower, upper)
        check_pointwise(model, preparation.layouts, sample, start, elsewhere)
        check_jac(model, preparation.layouts, sample, names, start, elsewhere)


def guessed_start(sweep: Sweep, model: Model, lower, upper) -> np.ndarray:
    """p0 (p,) within the bounds, that a ready model guesses from a sample of the data; two equal ones hold a parameter.

    Raises
    ------
    ValueError
        Where no point of the sample counts, or the guess is not finite.
    """
    sample = sweep.points(GUESS_POINTS)
    preparation, n = sweep.data.preparation._replace(layouts=sample.layouts), int(sample.block.geometry[0])
    values, counts = pick(preparation, Chunk((sample.block,), (), (), (), ((n,),)), np.arange(n))
    y, x = values[0], values[2]
    padded = np.full((2, max(n, GUESS_POINTS)), np.nan)  # nan does not count: one compilation for small data
    padded[:, :n] = np.where(counts, (x, y), np.nan)
    start = np.clip(guessed(model, padded[0], padded[1], lower, upper), lower, upper)
    if not np.isfinite(start).all():
        raise ValueError(f"the guess of {function_name(model.f)} from {n} points is not finite, {start}: give p0 as numbers")
    return start
