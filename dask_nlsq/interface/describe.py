"""What a path holds that this package has written, in words: a result, a checkpoint, or maps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..base.files import FIT_FILE, RESULT
from ..base.modules import directory_of
from ..engine.checkpoint import read_end, read_fit, read_state
from ..maps.store import NoMapError, read_done
from ..maps.stored import StoredMap
from ..maps.views import status_counts


def describe(path: Path, load: Callable) -> str:
    """What is at ``path``; ``load`` is `dask_nlsq.load`.

    Raises
    ------
    ValueError
        Where it is none of these.
    """
    if (path / RESULT).exists():
        result = load(path)
        lines = [result.summary(), "diagnostics:", *(f"  {line}" for line in result.diagnostics.lines)]
        return "\n".join(
            [*lines, *([f"the parameters of each group: {result.local.path}"] if hasattr(result, "local") else [])]
        )
    if (path / FIT_FILE).exists():
        return describe_checkpoint(path)
    try:
        return describe_map(path)
    except NoMapError:
        raise ValueError(f"{path} is neither a result, nor a checkpoint, nor maps that fit_map has written") from None


def describe_checkpoint(path: Path) -> str:
    call = read_fit(path)["call"]
    arrays, values = read_state(path)
    costs = arrays.get("costs", ())
    n = len(costs)
    if "cost" in arrays:  # of groups, in blocks; they may be read several times at one point
        costs, n = arrays["cost"].sum(axis=1), arrays["reads"].sum()
    model, data = ".".join(call["model"] or ["a model without a name"]), call["data"]["ydata"] or {}
    lines = [f"checkpoint of a fit of {model} to {data.get('path', 'an array')}"]
    lines.append(f"finished sweeps: {n}" + (f"; lowest cost {min(costs):.9g}" if len(costs) else ""))
    lines += ["one more is begun"] if "begun" in values else []
    if (ended := read_end(path)) is not None:
        return "\n".join([*lines, f"complete: {ended}", f"its result: {resume_command(path)} --out result"])
    return "\n".join([*lines, f"to continue: {resume_command(path)}"])


def resume_command(path: Path, out: Path | None = None) -> str:
    """The command that goes on with a checkpoint, with what it needs to find the model."""
    name, model = read_fit(path)["call"]["model"], ""
    if name is None:
        model = " --model module:function"
    elif directory := directory_of(name[0]):
        model = f" --models {directory}"
    return f"dask nlsq resume {path}{model}" + (f" --out {out}" if out is not None else "")


def describe_map(path: Path) -> str:
    found, done = StoredMap(path), read_done(path)
    about, status = found.about, found.status
    shape = " x ".join(map(str, status.shape))
    lines = [f"{path}: {shape or 1} pixel{'s' * (status.size != 1)}, {', '.join(about['parameters'])} of {about['model']}"]
    if not np.all(done):
        return "\n".join([*lines, f"{np.sum(done)} of {np.size(done)} blocks are done; dask nlsq map --resume continues"])
    lines.append(f"{np.sum(found.success):,} of {status.size:,} converged")
    return "\n".join([*lines, *status_counts(status)])
