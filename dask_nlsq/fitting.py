"""curve_fit and fit: prepare, bring the data where they are swept, solve, return."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import scipy

from .base.disk import check_room
from .base.text import near
from .base.warn import warn
from .data.chunks import Census
from .data.door import admit_data
from .data.labels import origins
from .data.sample import sample_size
from .data.store import warn_if_changed
from .engine.checkpoint import open_checkpoint, read_call
from .engine.cluster import attached
from .engine.evaluator import Evaluator, state_bytes
from .engine.sweep import open_sweep
from .engine.waiting import StopOnSignal, ToldToLeave
from .kernels.jac_mode import choose_jac_mode
from .kernels.rows import unpack
from .kernels.rules import ACCURACY, STUCK, UNDETERMINED
from .memory.plan import Plan
from .options import FITS, GROUPS, WORKFLOWS, with_known_names
from .prepare import Prepared, by_workflow, prepare
from .presets import OptimizationGoal
from .results.diagnostics import NO_COUNTS, scaled_covariance
from .results.result import FitResult
from .results.statistics import Totals
from .results.uncertainty import with_ties
from .solve.multistart import Search, polish, search
from .solve.outcome import WAY_OUT, NotConvergedError, after_signal, not_converged, not_finite_at_start
from .solve.start import GUESS_RUNS, check_start, guessed_start
from .solve.tries import fit_in_tries
from .solve.trust_region import Begin, NotFiniteAtStart, Options, Record, Solution, alone
from .solve.warm_start import hybrid, pays
from .watch.progress import Live, Observers, say_summary


@with_known_names(FITS)
def curve_fit(
    f: Callable,
    xdata: Any,
    ydata: Any = None,
    p0=None,
    sigma=None,
    absolute_sigma: bool = False,
    check_finite: bool | None = None,
    bounds=(-np.inf, np.inf),
    method: Literal["auto", "trf", "lm", "dogbox"] | None = None,
    jac: Callable | str | None = None,
    *,
    full_output: bool = False,
    nan_policy: Literal["raise", "omit"] | None = None,
    loss: str = "linear",
    f_scale: float = 1.0,
    x_scale="jac",
    ftol: float | None = 1e-8,
    xtol: float | None = 1e-8,
    gtol: float | None = 1e-8,
    accuracy: float | None = ACCURACY,
    max_nfev: int | None = None,
    maxfev: int | None = None,
    mask=None,
    mask_values=None,
    valid_range=None,
    xrange=None,
    on_bad_chunk: Literal["raise", "mask"] = "raise",
    missing_chunks: Literal["error", "mask", "fill"] = "error",
    decode_cf: bool = True,
    param_names=None,
    fixed: Mapping[str, float] | None = None,
    expr: Mapping[str, str | Callable] | None = None,
    strategy: Literal["auto", "standard", "chunked", "streaming"] = "auto",
    reduction: Literal["auto", "gram", "qr"] = "auto",
    jac_mode: Literal["auto", "columns", "arguments"] = "auto",
    tr_solver: Literal["exact", "cg"] | None = None,
    memory_limit_gb: float | None = None,
    partitions_per_thread: int | None = None,
    n_starts: int = 0,
    checkpoint: str | Path | None = None,
    callback: Callable[[Record], None] | None = None,
    progress: bool | None = None,
    verbose: Literal[0, 1, 2] = 0,
    performance_report: str | Path | None = None,
) -> FitResult:
    """Fit ``f(x, *params)`` to data of any size by nonlinear least squares.

    The arguments mean what they mean in `scipy.optimize.curve_fit`. The result is the optimum and covariance of one fit of
    all data, however they are chunked. Data first works too: ``curve_fit(xdata, ydata, f)``.

    Parameters
    ----------
    f : callable
        Model ``f(x, *params) -> y``, written with `jax.numpy`, one value per point. It must be pointwise: each value
        depends on its own x only. It may close over arrays.
    xdata : array_like, tuple or None
        An array that broadcasts against ydata, or one of shape ``(k, *ydata.shape)``; the model gets flat float64 pieces of
        it, of shape (n,) or (k, n). Or a tuple of k arrays that broadcast against ydata (axis vectors stay vectors); the
        model gets a tuple of (n,) arrays, integers as int64, so that they can index a table. NumPy, Dask, `zarr.Array`,
        xarray, or anything on disk with ``shape``, ``dtype`` and ``__getitem__``. A path or URL opens a Zarr array in a
        directory, a zip file or an object store, also inside a group; a list of paths is joined along the first axis. With
        xarray also names of coordinates, or None for those of all dimensions. Dates become seconds since the earliest one,
        durations seconds; NaT counts as nan. Data held by `dask_nlsq.hold` take the place of xdata and ydata.
    ydata : array_like
        Dependent data of any shape, of the same kinds. The other arrays are rechunked to the chunks of ydata.
    p0 : array_like, shape (p,), dict by name, or "guess", optional
        Start. A model of `dask_nlsq.models` guesses it from a sample of the data for "guess" and None, and guesses what a
        dict leaves out. For other models None means ones, or the middle of the bounds. Parameters of a result work as well,
        and those of lmfit with their bounds, fixed values and expressions.
    sigma : scalar, array_like, (M, M) array or "poisson", optional
        Standard deviation of y: one number, an array that broadcasts against y, or the covariance matrix of the M values of
        y (strategy "standard" only). "poisson": the square root of the model, reweighted until it settles. This gives the
        parameters of ``loss="poisson"``; the cost is half of Pearson's chi-square, which also scales the covariance.
    absolute_sigma : bool
        False: ``sigma`` is relative, and pcov is scaled so that the reduced chi-square is 1.
    bounds : 2-tuple of array_like, `scipy.optimize.Bounds`, or dict of pairs by name
        Lower and upper bounds; a scalar holds for all parameters, None in a dict means unbounded. Models of
        `dask_nlsq.models` have bounds of their own, which ``{name: (None, None)}`` removes.
    loss, f_scale : {"linear", "soft_l1", "huber", "cauchy", "arctan", "poisson"}, float
        As in `scipy.optimize.least_squares`; residuals above ``f_scale``, in units of sigma, count as outliers. "poisson" is
        the maximum likelihood for counts: the cost is half the deviance, the covariance the inverse of the Fisher
        information (never scaled), and the mean at least 1e-10.
    mask : array_like, optional
        Broadcasts against y; points where it is true (nonzero) are left out. So are the masked points of masked arrays.
    param_names : sequence of str, optional
        Names for messages and tables; by default from the signature of ``f``.
    fixed : dict, optional
        Values, by name, of parameters that are not fitted. They are in the result, with error 0.
    expr : dict, optional
        Ties by name, ``{"width2": "width1"}``. Names that are not parameters define derived quantities, as in
        ``{"area": "height * width"}``; they are in the result's ``derived``, with errors by the delta method. Text may
        contain names, numbers, ``+ - * / **`` and functions such as ``exp``. Instead of text, a function written with
        `jax.numpy`, whose arguments are named like parameters, or which takes a dict of all untied ones.
    xrange : pair, list of pairs, or dict of them by name or place of a coordinate, optional
        Fit range: points whose x is outside all intervals (low, high) count as masked. The ends belong to the interval; None
        means no limit. For several coordinates ``{0: (1, 2)}`` by place in ``xdata``, or by name in xarray.
    n_starts : int
        0: start from p0 only. Otherwise the best of this many starts, including p0, is found on a small sample of the data
        before all data are fitted; see `dask_nlsq.solve.multistart`. The result lists them in ``starts``.
    strategy : {"auto", "standard", "chunked", "streaming"}
        "standard": data in this process, threads. "chunked": Dask blocks, held by the workers of the active Client, or in
        this process without a Client. "streaming": nothing is held, each sweep reads the data again, here or on the workers.
        "auto": "chunked" for Dask and on-disk data with a Client, "streaming" where they do not fit in memory; `plan_fit`
        and the result's ``plan`` show which. Long fits begin with one of a small sample (`dask_nlsq.solve.warm_start`).
    memory_limit_gb : float, optional
        GiB that this process, or each worker, may use for the fit. Default: 75 % (see `get_adaptive_memory_threshold`) of
        the memory available here, or of each worker's limit up to which Dask does not spill.
    checkpoint : path, optional
        Directory in which a streaming fit saves its sweeps. If it is killed, `resume`, or the same call again, continues it.
        SIGTERM and Ctrl-C then return the best point so far, with status -3.
    progress : bool, optional
        Progress bar; None: in a terminal or notebook, for fits that take longer than two seconds.
    verbose : {0, 1, 2}
        1 prints a summary, 2 a line per sweep.
    callback : callable, optional
        Called with a `Record` after each trial step; raise StopIteration to stop with the result so far. A fit that is
        resumed does not call it again for the sweeps that its checkpoint has.
    check_finite, nan_policy : bool, {None, "raise", "omit"}
        By default, and with "raise", nonfinite values of x, y or sigma raise ValueError. "omit" leaves their points out and
        counts them. ``check_finite=False`` alone skips the check.
    mask_values : sequence of numbers, optional
        Stored values of y that mark invalid points, which count as masked. None: the largest value of unsigned integers of
        16 bits and more in files and stores, by which detectors mark gaps, also through Dask as it was stored; (): none.
    valid_range : pair, optional
        Lowest and highest valid value of y, after scaling (``decode_cf``); either may be None.
    on_bad_chunk : {"raise", "mask"}
        Unreadable chunks of Zarr arrays: an error, or their points are left out and the result's ``damage`` lists them.
    missing_chunks : {"error", "mask", "fill"}
        Absent chunks of Zarr arrays: an error before anything is read, left out, or read as fill values. "mask" needs a
        path or the zarr.Array, not an array of Dask or xarray.
    decode_cf : bool
        Whether to apply the attributes ``scale_factor``, ``add_offset``, ``_FillValue``, ``missing_value``, ``valid_min``,
        ``valid_max`` and ``valid_range`` of Zarr arrays and h5py datasets; the plan lists those applied. Masks refer to
        stored values. An array's own fill value, which is not an attribute, does not mask.
    ftol, xtol, gtol : float or None
        Termination: relative reduction of the cost, relative step, gradient; None turns a test off. As in SciPy, the
        gradient is in the units of the data for "trf", "dogbox" and with bounds; otherwise it is the cosine between the
        residual and the columns of the Jacobian.
    accuracy : float or None
        Largest distance, in standard errors, from the optimum of the quadratic model at which a fit that passes these tests
        has converged; see `dask_nlsq.kernels.rules`. None: SciPy's tests only.
    max_nfev, maxfev : int, optional
        Maximum number of evaluations of the cost; each is one sweep. By default 100 p, and 100 p more if a fit from p0 does
        not converge and is repeated with the linear parameters of p0 solved for; in a map 100 p.
    x_scale : "jac", scalar or array_like, shape (p,)
        Characteristic scale of each parameter; "jac" takes it from the columns of the Jacobian.
    method : {None, "auto", "trf", "lm", "dogbox"}
        For compatibility with SciPy: all use one trust-region reflective method, `dask_nlsq.solve.trust_region`. "lm" with
        bounds is an error, as in SciPy.
    jac : callable, optional
        ``jac(x, *params) -> (n, p)``, in jax.numpy. None and SciPy's "2-point", "3-point", "cs": exact derivatives by
        forward-mode differentiation.
    reduction : {"auto", "gram", "qr"}
        How rows are condensed: J^T J, or its triangular factor if the condition requires it.
    jac_mode : {"auto", "columns", "arguments"}
        Columns of J all at once, or argument by argument (faster if each parameter affects only a part of the model). For
        large data "auto" times both on a few thousand points, once per model.
    tr_solver : {None, "exact", "cg"}
        Subproblem by SVD, or by conjugate gradients; None: exact up to 500 parameters.
    partitions_per_thread : int, optional
        Tasks per sweep and worker thread. None: 4, up to 16 if memory requires it, fewer on more than 250 threads.
    performance_report : path, optional
        HTML file for Dask's `distributed.performance_report`; needs a Client. ``result.report(path)`` is about the result.
    full_output : bool
        Return SciPy's ``(popt, pcov, infodict, mesg, ier)``.

    Returns
    -------
    FitResult
        ``popt, pcov = result`` works. With ``full_output`` SciPy's 5-tuple.

    Raises
    ------
    ValueError, TypeError, NotADirectoryError
        Input that cannot be fitted; the message says why, and what to do.
    MemoryBudgetError
        The data do not fit where they are to be held; a MemoryError, raised before anything is read.
    BadChunkError, MissingChunksError
        Chunks of a Zarr array that cannot be read, or are absent.
    NotConvergedError
        Not converged within ``max_nfev``; a RuntimeError, whose ``result`` is the best so far.
    Interrupted
        Ctrl-C in a fit without a checkpoint; a KeyboardInterrupt, whose ``result`` is the best so far.
    NoWorkersError
        All workers were gone for longer than ``nlsq.worker-deadline``; a RuntimeError.

    Warns
    -----
    scipy.optimize.OptimizeWarning
        The data do not determine the covariance (pcov is inf); no step lowers the cost although the optimum of the quadratic
        model is far (status 11); or the model does not depend on a parameter (status 12).
    RuntimeWarning
        A store changed while a streaming fit read it, or the checkpoint could not be written.

    See Also
    --------
    fit_map, fit_groups : One fit for each pixel; one with shared parameters and others for each group.
    plan_fit, hold, resume : Memory before a fit; data for several fits; a killed fit, continued.

    Notes
    -----
    The methods and their sources are in `dask_nlsq.solve.trust_region` and `dask_nlsq.kernels.rows`.

    Examples
    --------
    >>> import dask.array as da, jax.numpy as jnp; from dask_nlsq import curve_fit
    >>> def decay(x, amplitude, rate):
    ...     return amplitude * jnp.exp(-rate * x)
    >>> x = da.linspace(0, 5, 10_000, chunks=1000)
    >>> curve_fit(decay, x, 2 * da.exp(-0.7 * x), p0=[1, 1]).popt.round(6)
    array([2. , 0.7])
    """
    ready = prepare(dict(locals())).read_covariance()
    result, run = _run(ready)
    result = after_signal(result, run.evaluator.stop, run.evaluator.checkpoint, partial(replace, result))
    if result.status == 0:
        raise NotConvergedError(not_converged(run.solution, ready.names), result)
    if result.status == STUCK:
        warn(f"Not converged: {result.message} {WAY_OUT}", scipy.optimize.OptimizeWarning)
    say_summary(result, ready.call.verbose)
    if ready.call.full_output:
        return result.scipy_output()  # type: ignore[return-value]  # what SciPy returns, to those who ask for it
    return result


curve_fit_large = curve_fit  # NLSQ's name for it: here every fit may be large


@with_known_names(FITS | WORKFLOWS)
def fit(
    f: Callable,
    xdata: Any,
    ydata: Any = None,
    p0=None,
    *,
    workflow: str = "auto",
    goal: OptimizationGoal | str | None = None,
    n_starts: int | None = None,
    **curve_fit_options,
) -> FitResult:
    """`curve_fit` with the strategy, tolerances and number of starts of a named workflow.

    Workflows that stream keep a checkpoint in a new directory below ``nlsq_checkpoints``, unless ``checkpoint`` is given.

    ==================  =========  ==================  ======
    workflow            strategy   tolerances          starts
    ==================  =========  ==================  ======
    "auto"              auto       by points           p0
    "standard"          standard   1e-8                p0
    "quality"           standard   1e-10               20
    "fast"              standard   1e-6                p0
    "large_robust"      chunked    1e-8                10
    "streaming"         streaming  1e-7                p0
    "hpc_distributed"   streaming  1e-6                p0
    ==================  =========  ==================  ======

    Parameters
    ----------
    f, xdata, ydata, p0
        As in `curve_fit`. Data held by `dask_nlsq.hold` keep their strategy.
    goal : OptimizationGoal or str, optional
        Shifts the tolerances by a tier, and sets whether several starts are tried; see `dask_nlsq.presets`.
    n_starts, **curve_fit_options : optional
        Number of starts, and any other arguments of `curve_fit`; they override the workflow.

    Raises
    ------
    ValueError
        An unknown workflow or goal; and as `curve_fit`.

    See Also
    --------
    curve_fit : Strategy, tolerances and starts one by one.

    Examples
    --------
    >>> result = fit(decay, x, y, p0=[1, 1], workflow="quality")  # doctest: +SKIP
    """
    options = dict(curve_fit_options, workflow=workflow, goal=goal, n_starts=n_starts)
    return curve_fit(**by_workflow(f, xdata, ydata, p0, options))


def resume(
    path: str | Path,
    f: Callable | None = None,
    xdata=None,
    ydata=None,
    *,
    sigma=None,
    mask=None,
    trust: bool | str | Path = False,
    **options,
) -> FitResult | Any:  # `GroupResult`, of a checkpoint of `fit_groups`
    """Continue a fit that was saved with ``checkpoint=path``; the result is bit-identical to that of an uninterrupted fit.

    Parameters
    ----------
    path : path
        Directory of the checkpoint.
    f, xdata, ydata, sigma, mask
        As in the call that is resumed. Needed only if the checkpoint does not contain them: models that cannot be imported
        by name, Dask arrays, open stores, arrays in memory above 64 MiB.
    trust : bool or path
        False: the checkpoint may open paths, and import installed packages and modules that are already imported. A
        directory: the modules in it as well. True: all modules, and URLs. What it imports and opens is printed.
    **options
        May differ from the first call: ``max_nfev``, ``memory_limit_gb``, ``callback``, ``progress``, ``verbose``.

    Raises
    ------
    CheckpointError
        No checkpoint, something missing in it, or a checkpoint of another model, other data or other options.
    UntrustedError
        A module or URL that ``trust`` does not allow; a ValueError.
    DamagedFileError
        A file that has changed since it was written; a ValueError.

    See Also
    --------
    curve_fit, fit_groups

    Examples
    --------
    >>> result = resume("fit.ckpt")  # doctest: +SKIP
    """
    f, data, kept = read_call(path, f, dict(xdata=xdata, ydata=ydata, sigma=sigma, mask=mask), trust)
    if "local" in kept:
        from .groups.fit import fit_groups

        return fit_groups(f, **data, **dict(kept, checkpoint=path) | options)
    return curve_fit(f, **data, **dict(kept, strategy="streaming", checkpoint=path) | options)


@with_known_names(FITS | WORKFLOWS | GROUPS)
def plan_fit(f: Callable, xdata: Any, ydata: Any = None, p0=None, **options) -> Plan:
    """Plan `curve_fit`, `fit` or `fit_groups`: strategy, number of tasks and memory.

    Reads only metadata and the keys of stores. ``plan_fit(...).explain()`` prints the plan as a table.

    Parameters
    ----------
    f, xdata, ydata, p0
        As in `curve_fit`.
    **options
        Any other arguments of `curve_fit`; of `fit` if ``workflow`` or ``goal`` is among them; of `fit_groups` if ``local``
        is.

    Raises
    ------
    MemoryBudgetError
        The data do not fit; the message has the numbers, and what to change.
    ValueError, TypeError, NotADirectoryError, BadChunkError, MissingChunksError
        As `curve_fit`, as far as this shows without the values of the data.

    See Also
    --------
    curve_fit, fit, fit_groups

    Examples
    --------
    >>> plan_fit(decay, x, y, p0=[1, 1], memory_limit_gb=4).explain()  # doctest: +SKIP
    """
    table, whose = (GROUPS, "fit_groups") if "local" in options else (FITS | WORKFLOWS, "curve_fit and fit")
    if unknown := sorted(options.keys() - table.keys()):
        what = f"an argument of {whose}: plan_fit plans fit_groups where `local` is given"
        raise TypeError(f"`{unknown[0]}` is not {what}{near(unknown[0], table, '; ')}")
    if "local" in options:
        from .groups.fit import prepare_groups

        known = {name: row.default for name, row in GROUPS.items()}
        return prepare_groups(known | dict(f=f, xdata=xdata, ydata=ydata, p0=p0) | options).plan
    if options.keys() & {"workflow", "goal"}:
        options = by_workflow(f, xdata, ydata, p0, options)
    else:
        options = dict(f=f, xdata=xdata, ydata=ydata, p0=p0) | options
    return prepare({name: row.default for name, row in FITS.items()} | options).plan


# ---------------------------------------------------------------------------------------------------------------------
# the fit


class _Run(NamedTuple):
    """What a fit has found, and what is known of its data once they have been read."""

    solution: Solution
    start: np.ndarray  # of all parameters
    search: Search | None
    counts: tuple[int, int, int]  # points used, masked, omitted
    evaluator: Evaluator
    seconds: dict[str, float]


def _run(ready: Prepared) -> tuple[FitResult, _Run]:
    """Bring the data where they are swept, find the start, solve."""
    call, n, began, model = ready.call, len(ready.free), time.perf_counter(), ready.objective.model
    with ExitStack() as stack:
        client, plan = ready.source.client, ready.plan
        stack.enter_context(attached(client, call.performance_report))
        live = stack.enter_context(Live.of(client, "curve_fit", model.f, ready.names, ready.options.accuracy, plan))
        observers = stack.enter_context(Observers(live, call, plan, ready.noise.absolute))
        sweep = ready.source.sweep
        if sweep is None:
            plan.warn()
            where, look = (plan.strategy, client, plan.n_partitions), partial(observers.at, "loading")
            sweep = stack.enter_context(open_sweep(ready.data, *where, look, plan.keeps))
        evaluator = Evaluator(sweep, ready.objective, n)
        stack.enter_context(observers.watching(evaluator, model))
        counts = cache(lambda: admit_data(cast(Census, sweep.census), ready.data, ready.objective.counts, n))
        start = _start(ready, evaluator, counts, observers, stack)
        if evaluator.checkpoint is None:
            evaluator.stop = stack.enter_context(StopOnSignal(False))
        loaded = time.perf_counter()
        try:
            options = replace(ready.options, began=loaded, callback=evaluator.following(observers))
            solution, found = _solve(ready, evaluator, start[ready.free], options)
            solution = solution._replace(equations=evaluator.whole(solution.params, solution.equations))
        except ToldToLeave as stop:  # before there is a point to return
            raise stop.exit from stop
        except NotFiniteAtStart as err:
            raise ValueError(not_finite_at_start(evaluator, start[ready.free], ready.names)) from err
        assert sweep.census is not None  # as after each sweep over all data
        seconds = dict(load=loaded - began, solve=time.perf_counter() - loaded)
        run = _Run(solution, start, found, counts(), evaluator, seconds)
        result = _assemble(ready, run)
        observers.ended(result)
        return result, run


def _start(ready: Prepared, evaluator: Evaluator, counts: Callable, observers: Observers, stack: ExitStack) -> np.ndarray:
    """The start of all parameters; what is held has been checked there, of what is not a sample has been drawn."""
    call, params, n, sweep = ready.call, ready.params, len(ready.free), evaluator.sweep
    model, every = ready.objective.model, ready.params.start.copy()
    lower, upper = ready.options.lower, ready.options.upper

    def check():
        observers.at("compiling")
        check_start(sweep, model, ready.names, every[ready.free], lower, upper)

    if sweep.place.held:
        counts()
        check()
    elif params.guessed:
        sweep.draw(n, GUESS_RUNS, partial(observers.at, "sample"))
    if params.guessed:
        given = [name not in params.guessed for name in ready.names]
        every[ready.free] = guessed_start(sweep, model, *np.where(given, ready.start, (lower, upper)))
    jac_mode = call.jac_mode
    if not sweep.place.held:
        if call.checkpoint is not None and _keep(ready, evaluator, every):
            jac_mode = evaluator.jac_mode
            observers.resumed()
        sweep.draw(n, call.n_starts > 0, partial(observers.at, "sample"))
        evaluator.save_sample()
        check()
        if evaluator.checkpoint is not None:
            evaluator.stop = stack.enter_context(StopOnSignal(True))
        evaluator.admit = lambda: (counts(), check())  # what is in the data is known when the first sweep has read them
    if jac_mode == "auto":
        preparation, n_points = ready.data.preparation, ready.data.n_points
        start = every[ready.free]
        jac_mode = choose_jac_mode(model, preparation.layouts, sweep.sample, start, n_points, preparation.kind)
    evaluator.jac_mode = jac_mode
    return every


def _keep(ready: Prepared, evaluator: Evaluator, start: np.ndarray) -> bool:
    """Open the checkpoint, once all is checked; whether an earlier process has left there what the fit goes on with."""
    path = ready.call.checkpoint
    path = Path(path() if callable(path) else path)
    check_room("checkpoint", path, state_bytes(len(ready.free)))
    kept = open_checkpoint(path, *ready.described(start))
    return evaluator.resume_from(kept)


def _solve(ready: Prepared, evaluator: Evaluator, start: np.ndarray, options: Options) -> tuple[Solution, Search | None]:
    begin: Begin = hybrid if pays(evaluator.sweep) else alone
    if ready.call.n_starts:
        evaluator.watch(f"fits of a sample from {ready.call.n_starts} starts", 0, 0)
        sample = evaluator.sweep.points(sample_size(len(start)))
        found = search(ready.objective, sample, start, options.lower, options.upper, ready.call.n_starts)
        return polish(found, evaluator, options, begin)
    return fit_in_tries(evaluator, start, options, begin), None


# ---------------------------------------------------------------------------------------------------------------------
# after the fit


def _assemble(ready: Prepared, run: _Run) -> FitResult:
    solution, params, data, noise, evaluator = run.solution, ready.params, ready.data, ready.noise, run.evaluator
    assert evaluator.weights is not None  # as after each sweep over all data
    dark = noise.loss == "poisson" and not evaluator.weights[:, 1].any()  # the mean is 0, whatever else the model has
    if dark and solution.status > 0:
        solution = solution._replace(status=UNDETERMINED, message=NO_COUNTS, distance=np.nan)
    if evaluator.checkpoint is not None:
        evaluator.checkpoint.end()
    for each in ready.source.stored if ready.plan.strategy == "streaming" else ():
        warn_if_changed(each)
    n_points, n_masked, n_omitted = run.counts
    equations = solution.equations
    cost = equations.pearson / 2 if noise.reweighted else equations.cost
    dof = n_points - len(ready.free)
    variance = 1.0 if noise.absolute else 2 * cost / dof if dof > 0 else np.nan
    pcov = scaled_covariance(solution, variance, ready.names)
    popt = run.start.copy()
    popt[ready.free] = solution.params
    popt, pcov, spread, derived = with_ties(params, popt, pcov)
    tied = {} if params.ties is None else {name: params.ties.texts[name] for name in params.ties.tied}
    whitened, sigma = data.factor is not None, data.operands[1]
    one_sigma = float(np.asarray(sigma).item()) if sigma.size == 1 and not whitened else None
    assert equations.parts is not None  # as after each sweep over all data
    sums = [np.nan] * 3 if whitened else evaluator.weights.sum(axis=0).tolist()
    return FitResult(
        popt=popt,
        pcov=pcov,
        param_names=params.names,
        cost=cost,
        n_points=n_points,
        n_masked=n_masked,
        n_omitted=n_omitted,
        nfev=solution.nfev,
        sweeps=evaluator.count,
        resumed=evaluator.resumed,
        status=solution.status,
        message=solution.message,
        optimality=solution.optimality,
        distance=solution.distance,
        plan=ready.plan,
        reduction=equations.reduction,
        jac_mode="user" if ready.objective.model.jac is not None else evaluator.jac_mode,
        history=solution.history,
        seconds=run.seconds,
        starts=run.search,
        sample=evaluator.drawn or evaluator.sweep.drawn,
        damage=evaluator.sweep.damage,
        n_filled=sum(len(each.absent) for each in ready.source.stored),
        fixed={name: float(popt[k]) for k, name in enumerate(params.names) if name not in (*ready.names, *tied)},
        tied=tied,
        derived=derived,
        spread=spread,
        bounds=np.stack([params.lower, params.upper]),
        noise=noise._replace(sigma=one_sigma),
        totals=Totals(cost, n_points, *sums),
        parts=unpack(equations.parts, len(ready.free))._replace(weights=evaluator.weights),
        factor=solution.factor,
        objective=ready.objective,
        preparation=data.preparation,
        data=data,
        _labels=None if whitened else ready.source.labels,  # whitened points have lost their places
        _origins=origins(ready.source.arrays["xdata"]),
    )
