"""curve_fit and fit: check, bring the data where they are swept, solve, return."""

import logging
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.optimize import OptimizeWarning

from .base.values import positive
from .data.arrays import check_sendable
from .data.door import admit_data, align_data, count_points, open_data, too_few
from .data.labels import by_name, origins, warn_if_packed
from .data.sample import sample_size
from .data.store import Policy, warn_if_changed
from .engine.checkpoint import Interrupted, StopOnSignal, create_checkpoint_directory, open_checkpoint, read_call
from .engine.cluster import attached
from .engine.condensed import Segmentation
from .engine.evaluation import Evaluation
from .engine.streaming import StreamingSweep
from .engine.sweep import open_sweep
from .interface.progress import Live, Observers
from .kernels.jac_mode import choose_jac_mode
from .kernels.rows import unpack
from .kernels.rules import ACCURACY, STUCK, UNDETERMINED
from .memory.machine import active_client
from .memory.plan import Plan, make_plan
from .model.function import function_name, held, intern
from .options import (
    accuracy_wanted,
    check_options,
    finite_policy,
    jacobian,
    known_names,
    likelihood,
    limit,
    model_first,
    parameters,
    partitions,
    ready_model,
    scale,
    starts_wanted,
    tolerance,
)
from .presets import OptimizationGoal, workflow_options
from .results.diagnostics import combinations
from .results.result import FitResult
from .results.statistics import Noise, Totals
from .results.uncertainty import covariance, spread_out
from .solve.multistart import Search, fit_again, polish, search
from .solve.outcome import NotConvergedError, not_converged, not_finite_at_start
from .solve.start import GUESS_RUNS, check_start, guessed_start
from .solve.trust_region import NotFiniteAtStart, Options, Record, Solution, solve
from .solve.warm_start import hybrid

logger = logging.getLogger("dask_nlsq")


def curve_fit(
    f: Callable,
    xdata: Any,
    ydata: Any,
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
    on_bad_chunk: Literal["raise", "mask"] = "raise",
    missing_chunks: Literal["error", "mask", "fill"] = "error",
    decode_cf: bool = True,
    param_names=None,
    fixed: Mapping[str, float] | None = None,
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
    report: str | Path | None = None,
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
        earliest one, durations seconds; NaT counts as nan.
    ydata : array_like
        Dependent data of any shape, of the same kinds. The chunks of ydata rule, the others are rechunked to them.
    p0 : array_like, shape (p,), dict by name, or "guess", optional
        Start. "guess", or None: what a model of `dask_nlsq.models` guesses from a sample of the data, as well as what a dict
        does not name. None with any other model: ones, or the middle of the bounds, for as many parameters as ``f`` has.
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
    loss : {"linear", "soft_l1", "huber", "cauchy", "arctan", "poisson"}
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
        Most evaluations of the cost, one sweep over the data each; 100 p by default.
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
    report : path, optional
        HTML file for Dask's `distributed.performance_report` of the fit; needs a Client.

    Returns
    -------
    FitResult
        ``popt, pcov = result`` works. With ``full_output`` SciPy's 5-tuple.

    Raises
    ------
    ValueError, TypeError
        Input that cannot be fitted; the message says which, and what to do.
    MemoryBudgetError
        Data that do not fit where they are to be held; a MemoryError, raised before anything is read.
    BadChunkError, MissingChunksError
        Chunks of a Zarr array that cannot be read, or that are absent.
    NotConvergedError
        No convergence within ``max_nfev``; a RuntimeError, whose ``result`` is the best so far.

    Warns
    -----
    scipy.optimize.OptimizeWarning
        Where the data do not determine the covariance; pcov is inf then. Where a fit ends without success: no step lowers
        the cost although the optimum of the quadratic model is far (status 11), or the model does not depend on a parameter
        (status 12).
    RuntimeWarning
        Where a store was written to while its data were read anew in each sweep.

    Notes
    -----
    Each sweep reads the data once and gives cost, gradient and the p x p matrix of the quadratic model together; see
    `dask_nlsq.solve.trust_region` and `dask_nlsq.kernels.rows` for the methods and their sources.
    """
    given = dict(locals())
    check_options(given)
    f, xdata, ydata = model_first(f, xdata, ydata)
    if decode_cf:
        warn_if_packed(ydata)
    xdata, sigma, mask, labels = by_name(xdata, ydata, sigma, mask)
    loss, reweighted = likelihood(loss, sigma)
    p0, bounds, guesses = ready_model(f, p0, bounds, param_names, method)
    all_names, all_lower, all_upper, all_start, free = parameters(f, p0, bounds, param_names, fixed, guesses)
    names, (lower, upper, start) = [all_names[k] for k in free], np.stack([all_lower, all_upper, all_start])[:, free]
    method = None if method == "auto" else method
    n_starts = starts_wanted(n_starts)
    if method == "lm" and np.any(np.isfinite([lower, upper])):
        raise ValueError("Method 'lm' only works for unconstrained problems. Use 'trf' or 'dogbox' instead.")
    model = intern(*held(f, jacobian(jac), all_start, free))
    known = absolute_sigma or (loss == "poisson" and not reweighted)
    options = Options(
        lower=lower,
        upper=upper,
        x_scale=scale(x_scale, len(all_start), free),
        ftol=tolerance("ftol", ftol),
        xtol=tolerance("xtol", xtol),
        gtol=tolerance("gtol", gtol),
        accuracy=accuracy_wanted(accuracy),
        noise="known" if known else "pearson" if reweighted else "cost",
        names=tuple(names),
        max_nfev=limit(max_nfev, maxfev),
        gtol_relative=method in (None, "lm") and not np.any(np.isfinite([lower, upper])),
        reduction=reduction,
        tr_solver=tr_solver,
    )
    check, omit = finite_policy(check_finite, nan_policy)
    if checkpoint is not None:
        strategy = "streaming"
    as_given = dict(xdata=xdata, ydata=ydata, sigma=sigma, mask=mask)
    without = as_given | dict(sigma=None) if reweighted else as_given
    policy = Policy(on_bad_chunk, missing_chunks)
    data, stored, rules = open_data(without, policy, mask_values, valid_range, decode_cf, loss)
    rules |= dict(check=check, omit=omit, counts=loss == "poisson")
    problem = align_data(model, len(start), **data, strategy=strategy, rules=rules)
    if problem.n_points < len(start):
        raise TypeError(too_few(len(start), problem.n_points))
    client = active_client()
    plan = make_plan(problem, len(start), strategy, memory_limit_gb, client, partitions(partitions_per_thread))
    if plan.strategy == "standard":
        client = None
    if client is not None:
        check_sendable(**as_given)
        for line in plan.advice:
            logger.warning("%s", line)
    evaluation = Evaluation(model, problem.rules, loss, positive("f_scale", f_scale), Segmentation.of(problem, len(start)))

    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(attached(client, report))
        live = stack.enter_context(Live(client, function_name(model.f), names, start, plan, absolute_sigma))
        place = problem, evaluation, client, plan.n_partitions
        streamed = StreamingSweep(*place) if plan.strategy == "streaming" else None
        live.sweep = sweep = streamed or open_sweep(*place)
        stack.enter_context(sweep)

        @cache
        def admit():
            counts = admit_data(sweep.census(), problem, len(start))
            check_start(sweep, names, start, lower, upper)
            return counts

        if guesses:
            if streamed:
                streamed.draw(len(start), needed=GUESS_RUNS)
            else:
                admit()
            start = np.where([name in guesses for name in names], guessed_start(sweep, model, lower, upper), start)
            all_start[free] = start
            live.guessed(start)
        if checkpoint is not None and streamed:
            bounds = (all_lower, all_upper)
            path = checkpoint() if callable(checkpoint) else checkpoint  # nothing is created before all is checked
            kept = open_checkpoint(
                path, model, as_given, problem, stored, given | dict(p0=all_start, bounds=bounds, param_names=all_names)
            )
            if streamed.resume_from(kept):
                jac_mode = streamed.jac_mode
            streamed.leave = stack.enter_context(StopOnSignal())
        if streamed:
            streamed.draw(len(start), needed=n_starts > 0)
            check_start(streamed, names, start, lower, upper)
            streamed.admit = admit  # what is in the data is known when the first sweep has read them
        else:
            admit()
        if jac_mode == "auto":
            jac_mode = choose_jac_mode(model, problem.rules.layouts, sweep.sample(), start, problem.n_points)
        sweep.jac_mode = jac_mode
        loaded = time.perf_counter()
        try:
            with Observers(callback, progress, verbose, live) as observers:
                options = replace(options, callback=observers)
                if streamed:
                    streamed.watch = observers.reading
                found: Search | None = None
                solver: Callable = hybrid if streamed else solve
                if n_starts:
                    sample = sweep.points(sample_size(len(start)))
                    found = search(evaluation, sample, start, lower, upper, n_starts)
                    solution, found = polish(found, sweep, options, solver)
                else:
                    solution = solver(sweep, start, options)
                    solution = fit_again(solution, sweep, evaluation, start, options, solver)
        except Interrupted as stop:  # before there is a point to return
            raise KeyboardInterrupt if stop.signal == signal.SIGINT else SystemExit(128 + stop.signal) from stop
        except NotFiniteAtStart as err:
            raise ValueError(not_finite_at_start(sweep, model, start, names)) from err
        n_points, n_masked, n_omitted = admit()
        sweeps, drawn, damage = sweep.count, sweep.drawn, sum((census.damage for census in sweep.census()), ())
        live.ended(solution.message, n_masked + n_omitted, len(damage))
    for each in stored if streamed else ():
        warn_if_changed(each)
    cost = solution.equations.pearson / 2 if reweighted else solution.equations.cost
    pcov = _scaled_covariance(solution, None if known else cost, n_points, names)
    popt = all_start.copy()
    popt[free] = solution.params
    assert solution.equations.parts is not None and sweep.weights is not None  # as after each sweep over all data
    parts = unpack(solution.equations.parts, len(free))._replace(weights=sweep.weights)
    result = FitResult(
        popt=popt,
        pcov=spread_out(pcov, free, len(popt)),
        param_names=all_names,
        cost=cost,
        n_points=n_points,
        n_masked=n_masked,
        n_omitted=n_omitted,
        nfev=solution.nfev,
        sweeps=sweeps,
        status=solution.status,
        message=solution.message,
        optimality=solution.optimality,
        distance=solution.distance,
        plan=plan,
        reduction=solution.equations.reduction,
        jac_mode="user" if model.jac is not None else jac_mode,
        history=solution.history,
        seconds=dict(load=loaded - started, solve=time.perf_counter() - loaded),
        starts=found,
        sample=drawn,
        damage=damage,
        n_filled=sum(len(each.absent) for each in stored),
        fixed={name: float(popt[k]) for k, name in enumerate(all_names) if k not in free},
        bounds=np.stack([all_lower, all_upper]),
        noise=Noise(loss, known, reweighted, _one_sigma(problem)),
        totals=Totals(cost, n_points, *(sweep.weights.sum(axis=0).tolist() if problem.factor is None else [np.nan] * 3)),
        parts=parts,
        factor=solution.factor,
        evaluation=evaluation,
        data=problem,
        _labels=labels if problem.factor is None else None,  # whitened points have lost their places
        _origins=origins(xdata),
    )
    if solution.status == 0:
        raise NotConvergedError(not_converged(solution, names), result)
    if solution.status == STUCK:
        warnings.warn(f"Not converged: {solution.message} {WAY_OUT}", OptimizeWarning, stacklevel=2)
    if solution.status == -3:
        logger.warning("%s", solution.message)
    logger.info("%s", result.summary())
    if verbose:
        print(result.summary())
    if full_output:
        return result.scipy_output()  # type: ignore[return-value]  # what SciPy returns, to those who ask for it
    return result


CHANGE = {
    True: "Start from values at which it does, see that x has the unit that the model expects (dates are seconds), or hold "
    "it with `fixed`. A model with steps has no derivatives",
    False: "Hold one of them with `fixed`, or start components that are alike from different values",
}
WAY_OUT = (
    "Start from other values, or raise max_nfev; a model with steps or corners has no optimum that derivatives can find. "
    "accuracy=None takes what SciPy's tests accept."
)

curve_fit_large = curve_fit  # NLSQ's name for it: here every fit may be large


def fit(
    f: Callable,
    xdata: Any,
    ydata: Any,
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
        As in `curve_fit`.
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
    f, xdata, ydata = model_first(f, xdata, ydata)
    known_names(curve_fit, curve_fit_options)
    options = workflow_options(workflow, goal, count_points(ydata), n_starts)
    if options["strategy"] == "streaming" and not curve_fit_options.keys() & {"checkpoint", "strategy"}:
        options["checkpoint"] = create_checkpoint_directory
    return curve_fit(f, xdata, ydata, p0, **options | curve_fit_options)


def resume(
    path: str | Path, f: Callable | None = None, xdata=None, ydata=None, *, sigma=None, mask=None, **options
) -> FitResult:
    """Go on with a fit that ``checkpoint=path`` has kept; the result has the bits of one that was never interrupted.

    Parameters
    ----------
    path : path
        Directory of the checkpoint.
    f, xdata, ydata, sigma, mask
        As in the call that is resumed. Needed only where the checkpoint does not hold them: a model that cannot be
        imported by its name, Dask arrays, open stores, arrays in memory above 64 MiB.
    **options
        Limits and what a fit tells may change: ``max_nfev``, ``memory_limit_gb``, ``callback``, ``progress``, ``verbose``.

    Raises
    ------
    CheckpointError
        No checkpoint, something that it does not hold, or another model, other data or options than it was made with.
    """
    f, data, kept = read_call(path, f, dict(xdata=xdata, ydata=ydata, sigma=sigma, mask=mask))
    return curve_fit(f, **data, **dict(kept, strategy="streaming", checkpoint=path) | options)


def plan_fit(f: Callable, xdata: Any, ydata: Any, p0=None, **options) -> Plan:
    """How `curve_fit`, or `fit`, would run: where the data are held, in which pieces, and what that takes.

    Reads and computes nothing. ``plan_fit(...).explain()`` prints the plan as a table.

    Parameters
    ----------
    f, xdata, ydata, p0
        As in `curve_fit`.
    **options
        Any other arguments of `curve_fit`, or of `fit` where ``workflow`` or ``goal`` is among them.

    Raises
    ------
    MemoryBudgetError
        Where the data do not fit; the message has the numbers and the way out.
    ValueError, TypeError
        As `curve_fit`, as far as it can be seen without the values of the data.
    """
    f, xdata, ydata = model_first(f, xdata, ydata)
    if not options.keys().isdisjoint(("workflow", "goal")):
        named = options.pop("workflow", "auto"), options.pop("goal", None)
        options = workflow_options(*named, count_points(ydata), options.pop("n_starts", None)) | options
    known_names(curve_fit, options)
    call = signature(curve_fit).bind(f, xdata, ydata, p0, **options)
    call.apply_defaults()
    given = call.arguments
    check_options(given)
    p0, bounds, guesses = ready_model(f, p0, given["bounds"], given["param_names"])
    _, _, _, every, free = parameters(f, p0, bounds, given["param_names"], given["fixed"], guesses)
    start = every[free]
    scale(given["x_scale"], len(every), free)
    check, omit = finite_policy(given["check_finite"], given["nan_policy"])
    model = intern(*held(f, jacobian(given["jac"]), every, free))
    loss, reweighted = likelihood(given["loss"], given["sigma"])
    xdata, sigma, mask, _ = by_name(xdata, ydata, None if reweighted else given["sigma"], given["mask"])
    data = dict(xdata=xdata, ydata=ydata, sigma=sigma, mask=mask)
    values = given["mask_values"], given["valid_range"], given["decode_cf"]
    data, _, rules = open_data(data, Policy(), *values, loss, look=False)
    rules |= dict(check=check, omit=omit)
    problem = align_data(model, len(start), **data, strategy=given["strategy"], rules=rules)
    where = given["strategy"], given["memory_limit_gb"], active_client(), partitions(given["partitions_per_thread"])
    return make_plan(problem, len(start), *where)


# ---------------------------------------------------------------------------------------------------------------------
# after the fit


def _scaled_covariance(solution: Solution, cost: float | None, n_points: int, names):
    """Covariance, scaled so that the reduced chi-square of this cost is 1; not scaled where that is None."""
    p = len(solution.params)
    pcov = covariance(solution.factor) if solution.status != UNDETERMINED else None
    if pcov is not None and cost is None:
        return pcov
    if pcov is not None and cost is not None and n_points > p:
        return pcov * (2 * cost / (n_points - p))
    reasons = combinations(solution.factor, names)
    why = f": {'; '.join(reasons)}. {CHANGE[solution.status == UNDETERMINED]}" if reasons else ""
    warnings.warn(f"Covariance of the parameters could not be estimated{why}", OptimizeWarning, stacklevel=3)
    return np.full((p, p), np.inf)


def _one_sigma(problem):
    """Sigma, where it is the same for all points."""
    sigma = problem.operands[1]
    return float(np.asarray(sigma).item()) if sigma.size == 1 and problem.factor is None else None
