"""All that is known of a fit before its data are read: `curve_fit` solves it, `plan_fit` shows its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from .data.align import Problem
from .data.arrays import check_sendable
from .data.door import align_data, count_points, open_data
from .data.labels import Labels, by_name, warn_if_packed
from .data.store import Stored
from .engine.checkpoint import create_checkpoint_directory
from .engine.condensed import Segmentation
from .engine.evaluation import Evaluation
from .memory.machine import active_client
from .memory.plan import Plan, make_plan
from .model.function import held, intern
from .options import FITS, WORKFLOWS, Likelihood, checked, known_names, likelihood, model_first
from .parameters import Parameters, read_parameters, scale
from .presets import workflow_options
from .solve.trust_region import Options


@dataclass(frozen=True)
class Prepared:
    """A call of `dask_nlsq.curve_fit` that has been checked, and its data aligned."""

    given: Mapping[str, Any]  # the arguments as they came
    call: SimpleNamespace  # and as the fit takes them
    data: dict[str, Any]  # xdata, ydata, sigma and mask as they came, but for plain arrays in the place of labelled ones
    labels: Labels | None  # of y
    params: Parameters
    likelihood: Likelihood
    options: Options  # of the solver
    evaluation: Evaluation
    problem: Problem
    stored: list[Stored]  # arrays in stores that are read
    client: Any  # whose workers take part, if any
    plan: Plan

    @property
    def free(self) -> list[int]:
        return list(self.params.free)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the free parameters."""
        return self.options.names

    @property
    def start(self) -> np.ndarray:
        """Of the free parameters, (p,); within their bounds where it is to be guessed."""
        return self.params.start[self.free]


def prepare(given: Mapping[str, Any]) -> Prepared:
    """Check the arguments of `dask_nlsq.curve_fit` and align the data, of which nothing is read but the keys of stores.

    Raises
    ------
    ValueError, TypeError, MemoryBudgetError, BadChunkError, MissingChunksError
        As `dask_nlsq.curve_fit`.
    """
    call = checked(FITS, given)
    if call.method == "lm" and call.loss != "linear":
        raise ValueError("method='lm' supports only 'linear' loss function. Use 'trf' or 'dogbox' instead.")
    if call.checkpoint is not None and call.strategy not in ("auto", "streaming"):
        raise ValueError(f"`checkpoint` is for data that are read anew in each sweep: not for strategy={call.strategy!r}")
    f, xdata, ydata = model_first(given["f"], given["xdata"], given["ydata"])
    if call.decode_cf:
        warn_if_packed(ydata)
    xdata, sigma, mask, labels = by_name(xdata, ydata, call.sigma, call.mask)
    aim, params = likelihood(call), read_parameters(f, call)
    options, n = _solver_options(call, aim, params), len(params.free)
    model = intern(*held(f, call.jac, params.start, params.free))
    data = dict(xdata=xdata, ydata=ydata, sigma=sigma, mask=mask)
    opened, stored, rules = open_data(data | (dict(sigma=None) if aim.reweighted else {}), call, aim.loss)
    rules["counts"] = aim.loss == "poisson"
    rules["check"] = call.nan_policy is not None or call.check_finite is not False
    rules["omit"] = call.nan_policy == "omit" and not call.check_finite
    strategy: Any = call.strategy if call.checkpoint is None else "streaming"
    problem = align_data(model, n, opened, strategy, rules)
    evaluation = Evaluation(model, problem.rules, aim.loss, call.f_scale, Segmentation.of(problem, n))
    client = active_client()
    plan = make_plan(problem, n, strategy, call.memory_limit_gb, client, call.partitions_per_thread)
    client = None if plan.strategy == "standard" else client
    if client is not None:
        check_sendable(**data)
    elif call.report is not None:
        raise ValueError(
            f"report={str(call.report)!r} is about the work of a cluster: it needs a Client, and data that go there"
        )
    return Prepared(given, call, data, labels, params, aim, options, evaluation, problem, stored, client, plan)


def _solver_options(call, aim: Likelihood, params: Parameters) -> Options:
    free = list(params.free)
    lower, upper = params.lower[free], params.upper[free]
    bounded = bool(np.any(np.isfinite([lower, upper])))
    if call.method == "lm" and bounded:
        raise ValueError("Method 'lm' only works for unconstrained problems. Use 'trf' or 'dogbox' instead.")
    alike = ("ftol", "xtol", "gtol", "accuracy", "reduction", "tr_solver")
    return Options(
        lower=lower,
        upper=upper,
        x_scale=scale(call.x_scale, params),
        noise=aim.variance,
        names=tuple(params.names[k] for k in free),
        max_nfev=call.maxfev if call.max_nfev is None else call.max_nfev,
        gtol_relative=call.method in (None, "auto", "lm") and not bounded,
        **{name: getattr(call, name) for name in alike},
    )


def by_workflow(caller: str, f, xdata, ydata, p0, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `dask_nlsq.curve_fit` for those of `dask_nlsq.fit`; what is given wins over the workflow."""
    table = FITS | WORKFLOWS
    known_names(caller, table, given)
    named = checked(WORKFLOWS, {name: given.get(name, row.default) for name, row in WORKFLOWS.items()})
    f, xdata, ydata = model_first(f, xdata, ydata)
    options = workflow_options(named.workflow, named.goal, count_points(ydata), named.n_starts)
    if options["strategy"] == "streaming" and not given.keys() & {"checkpoint", "strategy"}:
        options["checkpoint"] = create_checkpoint_directory
    own = {name: value for name, value in given.items() if name not in WORKFLOWS}
    return dict(f=f, xdata=xdata, ydata=ydata, p0=p0) | options | own
