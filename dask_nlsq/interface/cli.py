"""``dask nlsq``: the commands that this package adds to Dask's own.

`CODES` says how they exit. Commands import what they need when they run, so that ``dask --help`` stays fast.
"""

import json
import re
import sys
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ..base.text import printable
from ..base.warn import warn
from ..options import FITS, GROUPS, LIMITS, MAPS, WORKFLOWS

PATH = click.Path(path_type=Path)
CODES = (
    "Exit codes: 0 converged, 2 bad usage: a wrong option or input, 3 not converged (the best so far is written), 4 damaged "
    "data, 1 anything else, as too little memory, a lost cluster, an error inside the model."
)
USAGE = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
OURS = (ValueError, TypeError, MemoryError, OSError, ImportError, RuntimeError)  # their messages say all that there is
# and what a model that cannot run raises
WRONG = (*OURS, NameError, AttributeError, LookupError, ArithmeticError, SyntaxError)
TOLD_TO_LEAVE = "stopped by Ctrl-C, at the best point so far: with --checkpoint the same command would go on from there"


# how the messages of the package name what is an option here
OPTIONS = re.compile(
    r"\b((?:resume|trust)(?==True)|max_nfev|n_starts|on_bad_chunk|missing_chunks|memory_limit_gb|decode_cf(?==False))\b"
    r"(?:=True|=False)?"
)


def _flag(name: str) -> str:
    row = FITS.get(name)
    return (row.option.flag if row and row.option else "") or name.replace("_", "-")


WORDS = {  # what is said otherwise here
    "Pass it, as in resume(path, f)": "Name it, as in --model module:function",
    'as in trust="models"': "as in --models DIR",
    "as in resume(path, xdata=...)": "as in --x 0:10:0.01",
    'nan_policy="omit"': "--nan-policy omit",
    "mask=, mask_values= or valid_range=": "--mask, --mask-values or --valid-range",
    "mask=": "--mask",
    "name it in `fixed`": "give it with --fixed",
    ", start from there, or loosen ftol, xtol and gtol": ", or start from there with --p0",
}


class Failure(click.ClickException):
    """One line on stderr, and an exit code."""

    def __init__(self, text: str, exit_code: int):
        for python, here in WORDS.items():
            text = text.replace(python, here)
        text = OPTIONS.sub(lambda found: f"--{'no-' * (found[1] == 'decode_cf')}{_flag(found[1])}", text)
        super().__init__(printable(" ".join(text.split())))
        self.exit_code = exit_code  # type: ignore[misc]  # of the class for click, of the error here


class Commands(click.Group):
    """Errors of usage in one line."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except click.UsageError as err:
            asked = err.ctx.command_path if err.ctx else ctx.command_path
            raise Failure(f"{err.format_message()} ({asked} --help says more)", 2) from err


@click.group(name="nlsq", cls=Commands, epilog=CODES)
def nlsq():
    """Nonlinear least squares for data that do not fit in memory."""


def _command(*options):
    """A subcommand with these options whose errors are one line."""

    def made(function):
        @wraps(function)
        def run(traceback, **given):
            try:
                with warnings.catch_warnings():
                    warnings.showwarning = _warn
                    function(**given)
            except (click.ClickException, click.Abort):
                raise
            except WRONG as err:
                raise _failure(err, traceback) from err

        shown = click.option("--traceback", is_flag=True, help="Show where an error was raised.")
        for option in reversed((*options, shown)):
            run = option(run)
        return nlsq.command(name=function.__name__.removesuffix("_"), epilog=CODES)(run)

    return made


def _warn(message, category, *_, **__):
    click.echo(f"Warning: {message}", err=True)


def _failure(err, with_traceback=False) -> Failure:
    from ..base.files import DamagedFileError
    from ..base.modules import is_installed
    from ..data.store import BadChunkError, MissingChunksError
    from ..solve.outcome import NotConvergedError

    if with_traceback:
        click.echo("".join(traceback.format_exception(err)), err=True)
    damaged = (BadChunkError, MissingChunksError, DamagedFileError)
    kinds: dict[int, Any] = {4: damaged, 3: NotConvergedError, 2: USAGE, 1: WRONG}
    code = next(code for code, kind in kinds.items() if isinstance(err, kind))
    frames = traceback.extract_tb(err.__traceback__)
    own = [frame for frame in frames if not (is_installed(frame.filename) or frame.filename.startswith("<"))]
    place = f" ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    kind = "" if isinstance(err, OURS) and not own else f"{type(err).__name__}: "
    return Failure(f"{kind}{err}{place}", code)


# ---------------------------------------------------------------------------------------------------------------------
# options

STORE = click.argument("store", type=click.Path())


def _ready(ctx, param, incomplete: str) -> list[str]:
    """Ready models and sums that a word may be completed to."""
    from ..model.ready import known

    before, plus, last = incomplete.rpartition("+")
    return [f"{before}{plus}{name}" for name in known() if name.startswith(last)]


MODEL = click.option(
    "--model",
    required=True,
    shell_complete=_ready,
    help="module:function, with the current directory on the path; or a ready model, or a sum: gaussian+line, "
    "lorentzian+polynomial:2.",
)
X = click.option(
    "--x",
    multiple=True,
    required=True,
    type=click.Path(),  # which shells complete
    metavar="RANGE|PATH",
    help="start:stop:step, without stop as in range; or the path of a Zarr array. One --x: the last axis. "
    "Several: one for each axis, in order; where there is one axis, one for each coordinate.",
)
SCHEDULER = click.option("--scheduler", metavar="ADDRESS", help="Run on this cluster: tcp://host:8786.")
OUT = click.option("--out", type=PATH, help="Directory for result.json, summary.json and report.html.")
REPORT = click.option(
    "--report/--no-report",
    default=True,
    help="Whether --out has the report, which reads the data once. Without it one of an earlier fit is removed.",
)
PROGRESS = click.option(
    "--progress/--no-progress", default=None, help="Whether there is a progress bar; by default in a terminal, after 2 s."
)
LOG = click.option("--log", type=PATH, help="File that gets one line per sweep.")


def _options(table):
    """The options that are arguments of `dask_nlsq.fit` or `dask_nlsq.fit_map`, as rows of its table."""
    for name, row in table.items():
        if row.option is None:
            continue
        flag = _flag(name)
        if row.option.kind is bool:
            yield click.option(f"--{'no-' * row.default}{flag}", name, is_flag=True, help=row.option.help)
        else:
            words: Any = getattr(row.check, "words", None)
            kind: Any = click.Choice(words) if words else PATH if row.option.kind is Path else row.option.kind
            yield click.option(f"--{flag}", name, type=kind, multiple=row.option.many, help=row.option.help)


FIT = (STORE, MODEL, X, *_options(FITS | {"workflow": WORKFLOWS["workflow"]}), SCHEDULER)
LIMIT = (*_options({name: FITS[name] for name in LIMITS}), SCHEDULER)


def _call(store, model, x, axis=None, read=True, group_axes=(), **said):
    """Arguments of `fit` and its kin from the words of the options; what was not said is left out."""
    from ..data.store import open_array
    from ..engine.checkpoint import absolute
    from ..maps.plan import AllBut, axes_of
    from . import cli_values as words

    store = absolute(store)
    array = open_array("STORE", store)
    options: dict[str, Any] = {} if axis is None else {"axis": axes_of(axis, None, array.ndim)}
    fit_axes = options.get("axis")
    if group_axes:
        options["group_axes"] = tuple(group_axes)
        fit_axes = axes_of(AllBut(tuple(group_axes), "--group-axes"), None, array.ndim)
    for name, value in said.items():
        if value is True:  # a flag, of what is not the default
            options[name] = not FITS[name].default
        elif value is not None and value is not False and value != ():
            options[name] = words.READ[name](value) if name in words.READ else value
    x = words.coordinates(x, array, fit_axes, read, options.get("decode_cf", True))
    return dict(f=words.model(model), xdata=x, ydata=store) | options


def _cluster(address):
    """With it the active client; nothing without an address."""
    if address is None:
        return nullcontext()
    from distributed import Client

    return Client(address)


@contextmanager
def _sweep_log(path):
    """A callback that writes a line for each `Record`; None without a path."""
    if path is None:
        yield None
        return
    failed = False
    with open(path, "ab", buffering=0) as file:  # a line that could not be written is not tried again at the end

        def line(record):
            nonlocal failed
            verdict = "accepted" if record.accepted else "refused"
            values = ", ".join(f"{value:.9g}" for value in record.params)
            text = (
                f"{datetime.now().astimezone().isoformat(timespec='seconds')} sweep {record.nfev} {verdict}: "
                f"cost {record.cost:.9g}, distance {record.distance:.3g} s.e., {record.seconds:.2f} s, at {values}\n"
            )
            try:
                file.write(text.encode())
            except OSError as err:
                if not failed:
                    warn(f"the fit goes on, but --log {path} could not be written: {err.strerror}", RuntimeWarning)
                failed = True

        yield line


# ---------------------------------------------------------------------------------------------------------------------
# one fit


@_command(*FIT, OUT, REPORT, PROGRESS, LOG)
def fit(scheduler, out, report, progress, log, **given):
    """Fit a model to the Zarr array at STORE, a path or URL.

    \b
    dask nlsq fit scan.zarr/entry/counts --model gaussian+line --x scan.zarr/entry/energy --out result
    """
    from ..fitting import curve_fit
    from ..fitting import fit as fit_by_workflow

    call = _call(**given) | dict(progress=progress)
    _solve(fit_by_workflow if "workflow" in call else curve_fit, call, scheduler, call.get("checkpoint"), out, report, log)


@_command(*FIT)
def plan(scheduler, **given):
    """Print how a fit would run, and the memory that it takes; reads metadata only.

    \b
    dask nlsq plan scan.zarr/entry/counts --model gaussian+line --x 0:10:0.01
    """
    from ..fitting import plan_fit

    call = _call(**given, read=False)
    with _cluster(scheduler):
        click.echo(plan_fit(**call))


def _solve(solve, call, scheduler, checkpoint, out, report, log):
    """Run a fit, write and print its result."""
    from ..base.files import FIT_FILE
    from ..solve.outcome import Interrupted, NotConvergedError
    from . import cli_values as words
    from .describe import resume_command

    if out is not None:
        words.new_place(out)
    failed = None
    with _cluster(scheduler), _sweep_log(log) as callback:
        try:
            result = solve(**call, callback=callback)
        except NotConvergedError as err:
            failed, result = f"{err}", err.result
        except Interrupted as err:
            failed, result, report = TOLD_TO_LEAVE, err.result, False
        except (KeyboardInterrupt, SystemExit):
            if checkpoint is None or not (checkpoint / FIT_FILE).exists():
                raise
            raise Failure(
                f"stopped before the first sweep was finished: continue with {resume_command(checkpoint, out)}", 3
            ) from None
        if result.status == -3 and failed is None:
            again = resume_command(checkpoint, out) if checkpoint else "dask nlsq resume nlsq_checkpoints/..."
            failed = f"{result.message} Continue with {again}"
        elif result.status > 0 and not result.success:
            failed = failed or result.message
        click.echo(printable(result.summary()))
        if out is not None:
            _write(result, out, report and result.status != -3)  # who is told to leave reads nothing more
    if failed is not None:
        raise Failure(failed, 3)


def _write(result, out, report):
    from ..base.files import write_whole

    verb = "replaced in" if (out / "result.json").exists() else "written to"
    result.save(out)
    text = json.dumps(result.to_dict(), indent=1)
    write_whole(out / "summary.json", [text.encode()])
    (out / "report.html").unlink(missing_ok=True)  # of an earlier result
    written = ["result.json", "summary.json", *["local.zarr"] * (out / "local.zarr").exists()]
    if report and find_spec("matplotlib") is None:
        click.echo('no report.html: pictures need matplotlib, pip install "dask_nlsq[plot]"', err=True)
    elif report:
        written.append(result.report(out / "report.html").name)
    click.echo(f"{verb} {out}: {', '.join(written)}")


# ---------------------------------------------------------------------------------------------------------------------
# the others


@_command(
    click.argument("directory", type=PATH),
    click.option("--model", help="Where it cannot be imported by the name that the checkpoint has."),
    click.option("--x", multiple=True, help="Where the checkpoint does not keep it: a range of more than 8 million values."),
    click.option("--models", type=PATH, help="Directory whose modules the checkpoint may import."),
    click.option("--trust", is_flag=True, help="Import whatever module and open whatever URL the checkpoint names."),
    *(*LIMIT, OUT, REPORT, PROGRESS, LOG),
)
def resume(directory, model, x, models, trust, scheduler, out, report, log, **limits):
    """Go on with the fit that has its checkpoint in DIRECTORY; the result has the bits of one that was not interrupted.

    Prints what the checkpoint imports and opens.

    \b
    dask nlsq resume scan.ckpt --out result
    """
    from .. import fitting as api
    from ..data.store import open_array
    from ..engine.checkpoint import read_fit
    from . import cli_values as words

    kept = read_fit(directory)["call"]
    if trust:
        sys.path.insert(0, str(Path().resolve()))
    call = dict(limits, path=directory, f=model and words.model(model), trust=trust or models or False)
    if x and "path" not in (kept["data"]["ydata"] or {}):
        raise ValueError(f"--x: {directory} does not know the path of its data: continue in Python with dask_nlsq.resume")
    if x:
        decode_cf = kept["options"]["decode_cf"]
        call["xdata"] = words.coordinates(x, open_array("STORE", kept["data"]["ydata"]["path"]), decode_cf=decode_cf)
    call = {name: value for name, value in call.items() if value is not None}
    _solve(api.resume, call, scheduler, directory, out, report, log)


@_command(
    *(STORE, MODEL, X, *_options(MAPS), SCHEDULER),
    click.option("--out", type=PATH, required=True, help="Zarr group for the maps."),
    click.option("--resume", is_flag=True, help="Go on with what is in --out."),
    PROGRESS,
)
def map_(scheduler, out, resume, progress, axis, **given):
    """Fit a model to each pixel of the map at STORE: all of its axes but --axis.

    Exits with 3 where no pixel converged.

    \b
    dask nlsq map scan.zarr/counts --model gaussian+line --x 9:11:0.01 --out maps.zarr --resume
    """
    from ..maps.fit import fit_map
    from ..maps.stored import StoredMap
    from .describe import describe_map

    call = _call(axis=axis or (-1,), **given)
    with _cluster(scheduler):
        fit_map(**call).to_zarr(out, resume, progress)
    click.echo(describe_map(out))
    if not StoredMap(out).success.any():
        raise Failure(f"no pixel converged; {out} says why in `status`", 3)


@_command(STORE, MODEL, X, *_options(GROUPS), SCHEDULER, OUT, REPORT, PROGRESS, LOG)
def groups(scheduler, out, report, progress, log, **given):
    """Fit a model with parameters that all data at STORE share, and --local ones of each group.

    \b
    dask nlsq groups frames.zarr --model models:sphere --x q.zarr --p0 radius=50,scale=1,background=0 \\
        --local scale,background --group-axes 0 --out result
    """
    from ..groups.fit import fit_groups

    call = _call(**given) | dict(progress=progress)
    _solve(fit_groups, call, scheduler, call.get("checkpoint"), out, report, log)


@_command(click.argument("path", type=PATH))
def info(path):
    """Print what is at PATH: a result, a checkpoint, or maps.

    \b
    dask nlsq info result
    """
    from ..groups.result import load
    from .describe import describe

    click.echo(printable(describe(path, load)))


@nlsq.command()
@click.option("--frames", default=200, show_default=True, help="Frames n per angle; 1000 give 23 million points.")
@click.option("--angles", default=23, show_default=True, help="Angles between -90 and 90 degrees.")
@click.option("--seed", default=0, show_default=True, help="Of the truth per angle, the start and the noise.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False),
    help="Where the Zarr store and the picture go and stay; a new temporary directory if not given.",
)
def demo(frames, angles, seed, directory):
    """Simulate a beamline measurement in a Zarr store, fit it, and compare with the truth.

    Exits with status 1 where the fit misses it.
    """
    try:
        from ..demo.run import run

        run(frames=frames, n_angles=angles, seed=seed, directory=directory, echo=click.echo)
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as err:
        raise click.ClickException(" ".join(f"{err}".split())) from err
