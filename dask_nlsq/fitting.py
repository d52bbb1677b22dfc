"""curve_fit and fit: prepare, bring the data where they are swept, solve, return."""

import logging
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
from .model.params import Params
from .options import FITS, GROUPS, WORKFLOWS, with_known_names
from .parameters import Parameters
from .prepare import Prepared, by_workflow, prepare
from .presets import OptimizationGoal
from .results.diagnostics import NO_COUNTS, scaled_covariance
from .results.result import FitResult
from .results.statistics import Totals
from .results.uncertainty import followers, spread_out
from .solve.multistart import Search, fit_again, polish, search
from .solve.outcome import NotConvergedError, interrupted, not_converged, not_finite_at_start
from .solve.start import GUESS_RUNS, check_start, guessed_start
from .solve.trust_region import NotFiniteAtStart, Options, Record, Solution, solve
from .solve.warm_start import hybrid
from .watch.progress import Live, Observers

logger = logging.getLogger("dask_nlsq")


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
    """Fit ``f(x, *params)`` to data by nonlinear least squares, wherever the data are.

    The arguments mean what they mean in `scipy.optimize.curve_fit`; the answer is the optimum and covariance of one fit
    of all data, however they are chunked. Data first works too: ``curve_fit(xdata, ydata, f)``.

    Parameters
    ----------
    f : callable
        Model ``f(x, *params) -> y`` written with `jax.numpy`, one value per point. It must be pointwise: a value
        depends on its own x only. It may close over arrays.
    xdata : array_like, tuple or None
        An array of y's shape (or one that broadcasts against y), or of shape ``(k, *ydata.shape)``; the model gets flat
        pieces of it, shape (n,) or (k, n), in float64. Or a tuple of k arrays that broadcast against y (axis vectors
        stay vectors); the model gets a tuple of (n,) arrays, integers as int64, so that they can index a table. NumPy,
        Dask, `zarr.Array`, xarray, or anything on disk with ``shape``, ``dtype`` and ``__getitem__``. A path or URL opens
        the Zarr array there, of a directory, a zip file or an object store, also as the member of a group; a list of these
        is one array, joined along the first axis. Dates (datetime64 of NumPy, pandas, Dask or xarray) are seconds since the
        earliest one, durations seconds; NaT counts as nan. Or what `dask_nlsq.hold` holds, in the place of all data.
    ydata : array_like
        Dependent data of any shape, of the same kinds. The chunks of ydata rule, the others are rechunked to them.
    p0 : array_like, shape (p,), dict by name, or "guess", optional
        Start. "guess", or None: what a model of `dask_nlsq.models` guesses from a sample of the data, as well as what a dict
        does not name. Parameters of a result, or of lmfit with what they say of bounds, values held and ties. None with any
        other model: ones, or the middle of the bounds, for as many parameters as ``f`` has.
    sigma : scalar, array_like, (M, M) array or "poisson", optional
        Standard deviation of y: one, or an array that broadcasts against y; or the covariance matrix of the M values of
        y (strategy "standard" only). "poisson": the root of the model, reweighted until it settles, which is at the
        parameters of ``loss="poisson"``; cost is half of Pearson's chi-square then, which also scales the covariance.
    absolute_sigma : bool
        False: ``sigma`` is relative, and pcov is scaled so that the reduced chi-square is 1.
    check_finite, nan_policy : bool, {None, "raise", "omit"}
        By default, and with "raise", values of x, y or sigma that are not finite raise ValueError. "omit" leaves their
        points out and counts them. ``check_finite=False`` alone skips the check.
    bounds : 2-tuple of array_like, `scipy.optimize.Bounds`, or dict of pairs by name
        Lower and upper bounds; scalars for all parameters. In a dict None is no bound. The default is that of the model for
        one of `dask_nlsq.models`; ``{name: (None, None)}`` takes it away.
    method : {None, "auto", "trf", "lm", "dogbox"}
        For SciPy's sake: all are solved by one trust-region reflective method, that of `dask_nlsq.solve.trust_region`.
        "lm" with bounds is an error, as in SciPy.
    jac : callable, optional
        ``jac(x, *params) -> (n, p)``, in jax.numpy. None and SciPy's "2-point", "3-point", "cs": exact derivatives by
        forward-mode differentiation.
    full_output : bool
        Return SciPy's ``(popt, pcov, infodict, mesg, ier)``.
    loss, f_scale : {"linear", "soft_l1", "huber", "cauchy", "arctan", "poisson"}, float
        rho, as in `scipy.optimize.least_squares`; ``f_scale`` is where a residual (in units of sigma) is an outlier. Or the
        maximum likelihood for counts, with half the deviance as cost, the inverse of Fisher's information as covariance
        (never scaled), and a mean of at least 1e-10.
    x_scale : "jac", scalar or array_like, shape (p,)
        Characteristic scale of each parameter; "jac" takes it from the columns of the Jacobian.
    ftol, xtol, gtol : float or None
        Termination: relative reduction of the cost, relative step, gradient. None: that test is off. As in SciPy the
        gradient counts in the units of the data for "trf", "dogbox" and with bounds, and without them otherwise, as the
        cosine between the residual and the columns of the Jacobian.
    accuracy : float or None
        Standard errors. A fit has converged only where these tests pass and the optimum of the quadratic model is nearer
        than that; see `dask_nlsq.kernels.rules`. None: SciPy's tests alone.
    max_nfev, maxfev : int, optional
        Most evaluations of the cost, one sweep over the data each. By default 100 p, and as many again where a fit from p0
        has not converged and a second one is tried, from p0 with its linear parameters solved for; in a map 100 p.
    mask : array_like, optional
        Broadcasts against y; where it is true (not zero) a point is left out. So are points where xdata, ydata or sigma are
        masked arrays, NumPy's or Dask's.
    mask_values : sequence of numbers, optional
        Values of y, as they are stored, that stand for no data; their points count as masked. None: for arrays in Zarr
        stores and HDF5 files the largest value of unsigned integers of 16 bits and more, which detectors write for dead
        pixels and gaps; () for none at all.
    valid_range : pair, optional
        Lowest and highest value of y that counts, each may be None; where y is scaled (``decode_cf``), of the scaled
        values.
    xrange : pair, list of pairs, or dict of them by name or place of a coordinate, optional
        Fit range: points whose x lies in none of the intervals (low, high) count as masked. Ends belong to them, None is no
        limit. Of several coordinates ``{0: (1, 2)}`` is by place in ``xdata``, ``{"energy": (8.9, 9.6)}`` by name of
        xarray's.
    on_bad_chunk : {"raise", "mask"}
        What becomes of chunks of Zarr arrays that cannot be read: an error that says which, or their points are left out
        and the chunks listed in the result's ``damage``.
    missing_chunks : {"error", "mask", "fill"}
        What becomes of chunks that are absent: an error before anything is read, left out, or read as fill values.
    decode_cf : bool
        Whether the attributes ``scale_factor``, ``add_offset``, ``_FillValue``, ``missing_value``, ``valid_min``,
        ``valid_max`` and ``valid_range`` of Zarr arrays and h5py data sets are applied; the plan says which were. They mask
        stored values; an array's own fill value, which has no attribute, does not.
    param_names : sequence of str, optional
        Names for messages and tables; from the signature of ``f`` by default.
    fixed : dict, optional
        Values of parameters, by name, that are not fitted. They are in the result, with error 0.
    expr : dict, optional
        What a parameter is a function of, by name: ``{"width2": "width1"}``. Names that are no parameter are derived
        quantities, ``{"area": "height * width"}``, in the result's ``derived``, with errors by the delta method. Text may
        have names, numbers, ``+ - * / **`` and functions such as ``exp``; else a function, written with `jax.numpy`, whose
        arguments are called like parameters, or which takes a dict of those that are not tied.
    strategy : {"auto", "standard", "chunked", "streaming"}
        "standard": data in this process, threads. "chunked": Dask blocks, held by the workers of the active Client, or
        in this process where there is none. "streaming": nothing is held, each sweep reads the data anew, here or on the
        workers, and a fit of a small sample comes first; see `dask_nlsq.solve.warm_start`. "auto": "chunked" for Dask and
        on-disk data with a Client, "streaming" where they do not fit in memory. The result says in ``plan`` what was
        decided, and `plan_fit` says it beforehand.
    reduction : {"auto", "gram", "qr"}
        How rows are condensed: J^T J, or its triangular factor where the condition asks for it.
    jac_mode : {"auto", "columns", "arguments"}
        How the columns of J are formed: all at once, or argument by argument, which pays where each parameter touches a
        part of the model only. "auto" times both on a few thousand points where the data are large, once per model.
    tr_solver : {None, "exact", "cg"}
        Subproblem by SVD, or by conjugate gradients; None: exact up to 500 parameters.
    memory_limit_gb : float, optional
        GiB, the most that this process, or each of the workers, may take for the fit; by default 75 % (see
        `get_adaptive_memory_threshold`) of what is available here, or of each worker's limit as far as Dask does not spill.
    partitions_per_thread : int, optional
        Tasks per sweep for each thread of the workers: many small ones even out the memory. None: 4, fewer on more
        than 250 threads, or as many as are necessary, up to 16.
    n_starts : int
        0: p0 alone. Else the best of so many starts, p0 among them, is looked for on a small sample of the data before
        all of them are fitted; see `dask_nlsq.solve.multistart`. The result lists them in ``starts``.
    checkpoint : path, optional
        Directory in which a fit that streams keeps what it has read, so that `resume`, or the same call again, goes on
        after it was killed. SIGTERM and Ctrl-C then end the fit at the best point so far, with status -3.
    callback : callable, optional
        Called with a `Record` after each trial step; raise StopIteration to stop with the result so far.
    progress : bool, optional
        Progress bar; None: in a terminal or notebook, for fits that take longer than two seconds.
    verbose : {0, 1, 2}
        1 prints a summary, 2 a line per sweep.
    performance_report : path, optional
        HTML file for Dask's `distributed.performance_report` of the fit; needs a Client. The page about the result is
        ``result.report(path)``.

    Returns
    -------
    FitResult
        ``popt, pcov = result`` works. With ``full_output`` SciPy's 5-tuple.

    Raises
    ------
    ValueError, TypeError
        Input that cannot be fitted; the message says which, and what to do.
    NotADirectoryError
        A checkpoint that is a file.
    MemoryBudgetError
        Data that do not fit where they are to be held; a MemoryError, raised before anything is read.
    BadChunkError, MissingChunksError
        Chunks of a Zarr array that cannot be read, or that are absent.
    NotConvergedError
        No convergence within ``max_nfev``; a RuntimeError, whose ``result`` is the best so far.
    Interrupted
        Ctrl-C in a fit without a checkpoint; a KeyboardInterrupt, whose ``result`` is the best so far.
    NoWorkersError
        No workers for as long as ``nlsq.worker-deadline`` allows; a RuntimeError.

    Warns
    -----
    scipy.optimize.OptimizeWarning
        Where the data do not determine the covariance; pcov is inf then. Where a fit ends without success: no step lowers
        the cost although the optimum of the quadratic model is far (status 11), or the model does not depend on a parameter
        (status 12).
    RuntimeWarning
        Where a store was written to while its data were read anew in each sweep, or the checkpoint could not be written.

    Notes
    -----
    Each sweep reads the data once and gives cost, gradient and the p x p matrix of the quadratic model together; see
    `dask_nlsq.solve.trust_region` and `dask_nlsq.kernels.rows` for the methods and their sources.
    """
    ready = prepare(dict(locals())).read_covariance()
    result, run = _run(ready)
    if result.status == 0:
        raise NotConvergedError(not_converged(run.solution, ready.names), result)
    if result.status == STUCK:
        warn(f"Not converged: {result.message} {WAY_OUT}", scipy.optimize.OptimizeWarning)
    interrupted(result, run.evaluator.stop, run.evaluator.checkpoint)
    logger.info("%s", result.summary())
    if ready.call.verbose:
        print(result.summary())
    if ready.call.full_output:
        return result.scipy_output()  # type: ignore[return-value]  # what SciPy returns, to those who ask for it
    return result


WAY_OUT = (
    "Start from other values, or raise max_nfev; a model with steps or corners has no optimum that derivatives can find. "
    "accuracy=None takes what SciPy's tests accept."
)

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
    """`curve_fit` with strategy, tolerances and number of starts by the name of a workflow.

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
        As in `curve_fit`. Data that `dask_nlsq.hold` holds have a strategy already: that of the workflow is not applied.
    goal : OptimizationGoal or str, optional
        Shifts the tolerances by a tier, and asks for several starts or for none; see `dask_nlsq.presets`.
    n_starts : int, optional
        Number of starts; by default that of the workflow and the goal.
    **curve_fit_options
        What is given here wins over the workflow.

    Raises
    ------
    ValueError
        An unknown workflow or goal; and as `curve_fit`.
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
    """Go on with a fit that ``checkpoint=path`` has kept; the result has the bits of one that was never interrupted.

    Parameters
    ----------
    path : path
        Directory of the checkpoint.
    f, xdata, ydata, sigma, mask
        As in the call that is resumed. Needed only where the checkpoint does not hold them: a model that cannot be
        imported by its name, Dask arrays, open stores, arrays in memory above 64 MiB.
    trust : bool or path
        The checkpoint may be anybody's: what it imports and opens is printed, and it may import modules of installed
        packages, and those that this process has imported, and open paths. A directory: the modules in it as well.
        True: all modules, and URLs.
    **options
        Limits and what a fit tells may change: ``max_nfev``, ``memory_limit_gb``, ``callback``, ``progress``, ``verbose``.

    Raises
    ------
    CheckpointError
        No checkpoint, something that it does not hold, or another model, other data or options than it was made with.
    UntrustedError
        A module or URL that ``trust`` does not allow; a ValueError.
    DamagedFileError
        A file that is not as it was written; a ValueError.
    """
    f, data, kept = read_call(path, f, dict(xdata=xdata, ydata=ydata, sigma=sigma, mask=mask), trust)
    if "local" in kept:
        from .groups.fit import fit_groups

        return fit_groups(f, **data, **dict(kept, checkpoint=path) | options)
    return curve_fit(f, **data, **dict(kept, strategy="streaming", checkpoint=path) | options)


@with_known_names(FITS | WORKFLOWS | GROUPS)
def plan_fit(f: Callable, xdata: Any, ydata: Any = None, p0=None, **options) -> Plan:
    """How `curve_fit`, or `fit`, would run: where the data are held, in which pieces, and what that takes.

    Reads nothing but metadata and the keys of stores. ``plan_fit(...).explain()`` prints the plan as a table.

    Parameters
    ----------
    f, xdata, ydata, p0
        As in `curve_fit`.
    **options
        Any other arguments of `curve_fit`; of `fit` where ``workflow`` or ``goal`` is among them, of `fit_groups` where
        ``local`` is.

    Raises
    ------
    MemoryBudgetError
        Where the data do not fit; the message has the numbers and the way out.
    ValueError, TypeError, NotADirectoryError
        As `curve_fit`, as far as it can be seen without the values of the data.
    BadChunkError, MissingChunksError
        Chunks of a Zarr array that are damaged or absent.
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
            loading = partial(observers.at, "loading")
            sweep = stack.enter_context(open_sweep(ready.data, plan.strategy, client, plan.n_partitions, loading))
        evaluator = Evaluator(sweep, ready.objective, n)
        stack.enter_context(observers.watching(evaluator, model))
        counts = cache(lambda: admit_data(cast(Census, sweep.census), ready.data, ready.objective.counts, n))
        start = _start(ready, evaluator, counts, observers, stack)
        if evaluator.checkpoint is None:
            evaluator.stop = stack.enter_context(StopOnSignal(False))
        loaded = time.perf_counter()
        try:
            options = replace(ready.options, began=loaded, callback=observers)
            solution, found = _solve(ready, evaluator, start[ready.free], options)
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
        guess = guessed_start(sweep, model, lower, upper)
        every[ready.free] = np.where([name in params.guessed for name in ready.names], guess, ready.start)
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
        layouts, n_points = ready.data.preparation.layouts, ready.data.n_points
        jac_mode = choose_jac_mode(model, layouts, sweep.sample, every[ready.free], n_points)
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
    solver: Callable = solve if evaluator.sweep.place.held else hybrid
    if ready.call.n_starts:
        evaluator.watch(f"fits of a sample from {ready.call.n_starts} starts", 0, 0)
        sample = evaluator.sweep.points(sample_size(len(start)))
        found = search(ready.objective, sample, start, options.lower, options.upper, ready.call.n_starts)
        return polish(found, evaluator, options, solver)
    return fit_again(solver(evaluator, start, options), evaluator, start, options, solver), None


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
    popt, pcov, spread, derived = _followed(params, popt, pcov)
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


def _followed(params: Parameters, popt: np.ndarray, pcov: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Params]:
    """Values, covariance and derivatives of all parameters, of which ``pcov`` has the free ones; what ``expr`` derives."""
    p, ties = len(popt), params.ties
    if ties is None:
        spread = np.eye(p)[:, list(params.free)]
        return popt, spread_out(pcov, spread), spread, Params()
    values, spread = ties.at(popt, params.free)
    every = spread_out(pcov, spread)
    return values[:p], every[:p, :p], spread[:p], followers(ties, values, every, ties.derived)
