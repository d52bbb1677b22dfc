"""The files of a saved result: ``result.json``, and beside it a file of its larger arrays, each with a checksum.

The names of fields are those of the format. They are written down here, once, and depend on no name of a class or a module;
who renames an attribute writes ``name=("attribute", kind)``, and who changes the fields counts `VERSION` up.
"""

from collections.abc import Callable, Mapping
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from ..base.files import DamagedFileError, read_arrays, read_json, write_arrays, write_json
from ..data.chunks import Preparation, ValuePolicy
from ..data.store import BadChunkError
from ..engine.condensed import Factor, Read
from ..engine.sweep import SampleSummary
from ..kernels.blocks import Layout, Layouts
from ..kernels.rows import Parts
from ..memory.plan import Plan
from ..memory.processes import ProcessMemory
from ..solve.multistart import Search
from ..solve.trust_region import Record
from .named_model import NamedModel
from .statistics import Noise, Totals

FORMAT, VERSION, RESULT = "result of dask_nlsq", 3, "result.json"
INLINE = 64  # elements of an array up to which it is written into the JSON, where people can read it


# ---------------------------------------------------------------------------------------------------------------------
# kinds of values


class Kind(NamedTuple):
    """How a value is kept: ``write(value, place, arrays)`` gives JSON, ``read(found, place, arrays)`` the value again.

    ``place`` is its name in the file, ``arrays`` what goes to the file of arrays, by place.
    """

    write: Callable[[Any, str, dict[str, np.ndarray]], Any]
    read: Callable[[Any, str, Mapping[str, np.ndarray]], Any]


def _write_plain(value, *_):
    value = value.item() if isinstance(value, np.generic) else value
    return {"float": str(value)} if isinstance(value, float) and not isfinite(value) else value


def _read_plain(found, *_):
    return float(found["float"]) if isinstance(found, dict) else found


def _write_array(value, place, arrays):
    if 0 < value.size <= INLINE and np.isfinite(value).all():
        return {"values": value.tolist(), "dtype": value.dtype.str}
    arrays[place] = value
    return {"stored": place}


def _read_array(found, place, arrays):
    if "values" in found:
        return np.array(found["values"], found["dtype"])
    if place not in arrays:
        raise missing(place)
    return arrays[place]


def missing(place: str) -> ValueError:
    return ValueError(f"the saved result has no `{place}`: load it with the release that has written it, or fit again")


plain = Kind(_write_plain, _read_plain)  # a number, a text, a truth value, or None
array = Kind(_write_array, _read_array)


def sequence(kind: Kind, make: type = tuple) -> Kind:
    def write(values, place, arrays):
        return [kind.write(each, f"{place}[{k}]", arrays) for k, each in enumerate(values)]

    def read(found, place, arrays):
        return make(kind.read(each, f"{place}[{k}]", arrays) for k, each in enumerate(found))

    return Kind(write, read)


def optional(kind: Kind) -> Kind:
    def write(value, place, arrays):
        return None if value is None else kind.write(value, place, arrays)

    def read(found, place, arrays):
        return None if found is None else kind.read(found, place, arrays)

    return Kind(write, read)


def by_name(kind: Kind) -> Kind:
    """A dict of names and values."""

    def write(values, place, arrays):
        return {name: kind.write(each, f"{place}.{name}", arrays) for name, each in values.items()}

    def read(found, place, arrays):
        return {name: kind.read(each, f"{place}.{name}", arrays) for name, each in found.items()}

    return Kind(write, read)


def record(make: Callable, **fields: Kind | tuple[str, Kind]) -> Kind:
    """What ``make`` takes, by the names of its fields in the file, with the attribute where that has another name."""
    attributes = {name: name if isinstance(each, Kind) else each[0] for name, each in fields.items()}
    kinds: dict[str, Kind] = {name: each if isinstance(each, Kind) else each[1] for name, each in fields.items()}

    def write(value, place, arrays):
        values = {name: attrgetter(each)(value) for name, each in attributes.items()}
        return {name: kind.write(values[name], f"{place}.{name}", arrays) for name, kind in kinds.items()}

    def read(found, place, arrays):
        for name in kinds.keys() - found.keys():
            raise missing(f"{place}.{name}")
        return make(**{name: kind.read(found[name], f"{place}.{name}", arrays) for name, kind in kinds.items()})

    return Kind(write, read)


# ---------------------------------------------------------------------------------------------------------------------
# the fields


def _layouts(x, kind, lead) -> Layouts:
    """Of any data with such coordinates."""
    return Layouts(Layout(True), Layout(False), None, x, kind, lead, ndim=1)


def _preparation(layouts, whole, decode_cf) -> Preparation:
    return Preparation(layouts, ValuePolicy(check=False, decode_cf=decode_cf), (), 1, whole, 0, ())


READ = record(Read, nbytes=plain, n_points=plain, n_left_out=plain, seconds=plain)
RECORD = record(
    Record,
    **dict.fromkeys(("iteration", "nfev", "cost", "actual", "predicted", "step_norm", "radius", "optimality"), plain),
    **dict.fromkeys(("accepted", "seconds", "reduction", "distance"), plain),
    params=array,
    read=optional(READ),
)
SEARCH = record(
    Search,
    **dict.fromkeys(("starts", "start_costs", "params", "costs", "basin"), array),
    **dict.fromkeys(("winner", "n_candidates", "n_points"), plain),
    chosen=sequence(plain),
)
SAMPLE = record(SampleSummary, n_points=plain, n_chunks=plain, of_chunks=plain, seconds=plain, nfev=plain)
PROCESS = record(
    ProcessMemory,
    **dict.fromkeys(("name", "n_threads", "now", "held", "peak", "limit", "limited", "cores"), plain),
    **dict.fromkeys(("dask_nlsq", "jax", "numpy", "python", "x64", "pjrt_nproc"), plain),
)
PLAN = record(
    Plan,
    **dict.fromkeys(("strategy", "reason", "n_points", "n_params", "n_chunks", "n_partitions"), plain),
    **dict.fromkeys(("sweep_bytes", "held_bytes", "in_flight_bytes"), plain),
    places=sequence(PROCESS),
    decoded=sequence(plain),
)
DAMAGE = record(BadChunkError, array=plain, index=sequence(plain), key=plain, cause=plain, masked=plain)
FACTOR = record(Factor, R=array, projected=array, gradient=array, condition=plain)
PARTS = record(
    Parts,
    **dict.fromkeys(("gram", "spread", "cost", "residual", "squares", "n", "n_tiles", "floored", "weights"), array),
)
MODEL = record(
    NamedModel,
    name=optional(sequence(plain, list)),
    fingerprint=plain,
    n=plain,
    values=sequence(plain, list),
    free=sequence(plain, list),
)
COORDINATES = record(
    _layouts,
    kind=("x_kind", plain),
    lead=("x_lead", sequence(plain)),
    x=sequence(record(lambda integer: Layout(True, integer), integer=plain)),
)
FIT = record(
    dict,
    **dict.fromkeys(("popt", "pcov", "bounds"), array),
    **dict.fromkeys(("cost", "n_points", "n_masked", "n_omitted", "n_filled", "nfev", "sweeps", "status", "message"), plain),
    **dict.fromkeys(("optimality", "distance", "reduction", "jac_mode"), plain),
    param_names=sequence(plain),
    fixed=by_name(plain),
    seconds=by_name(plain),
    plan=PLAN,
    history=sequence(RECORD, list),
    starts=optional(SEARCH),
    sample=optional(SAMPLE),
    damage=sequence(DAMAGE),
    noise=record(Noise, loss=plain, absolute=plain, reweighted=plain, sigma=plain),
    totals=record(Totals, cost=plain, n=plain, weight=plain, weighted=plain, squares=plain),
    parts=PARTS,
    factor=FACTOR,
    model=MODEL,
    loss=plain,
    f_scale=plain,
    preparation=record(_preparation, layouts=COORDINATES, whole=plain, decode_cf=("policy.decode_cf", plain)),
    origins=sequence(plain),
)


# ---------------------------------------------------------------------------------------------------------------------
# the files


def save(path: Path, fit) -> None:
    """Write what has the fields of `FIT`; what was there is replaced when all is written."""
    arrays: dict[str, np.ndarray] = {}
    text = FIT.write(fit, "result", arrays)
    path.mkdir(parents=True, exist_ok=True)
    try:
        before = read_json(path / RESULT, VERSION)["arrays"]
    except (FileNotFoundError, ValueError):  # none, or none that can be read
        before = None
    name = f"arrays-{uuid4().hex}.npz" if arrays else None
    if name:
        write_arrays(path / name, arrays)
    write_json(path / RESULT, format=FORMAT, version=VERSION, arrays=name, result=text)
    if before:
        (path / before).unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """The fields of `FIT`, as `save` has written them.

    Raises
    ------
    ValueError
        Where there is no result, one of another version, one without a field; a `DamagedFileError` for a damaged file.
    """
    try:
        found = read_json(path / RESULT, VERSION)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not a saved result: it has no {RESULT}") from None
    kept = read_arrays(path / found["arrays"]) if found["arrays"] else ({}, {})
    if kept is None:
        raise DamagedFileError(path / found["arrays"], "it is not there")
    return FIT.read(found["result"], "result", kept[0])
