"""The files of a saved result: ``result.json``, and beside it a file of its larger arrays, each with a checksum.

The names of records and fields are those of the format. They are written down here, once, and depend on no name of a class
or a module: who renames an attribute writes "field=attribute", and who changes the fields counts `VERSION` up. Numbers come
back with the same bits.
"""

import re
from collections.abc import Callable, Mapping
from math import isfinite
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from uuid import uuid4

import numpy as np

from ..base.files import (
    FIT_FILE,
    RESULT,
    DamagedFileError,
    check_link,
    make_directory,
    read_arrays,
    read_json,
    remove_left,
    well_formed,
    write_arrays,
    write_json,
)
from ..base.values import is_integer, is_number
from ..data.chunks import Preparation
from ..data.store import BadChunkError
from ..engine.condensed import Factor, Read
from ..engine.sweep import SampleSummary
from ..kernels.blocks import Layout, Layouts
from ..kernels.rows import SegmentSums
from ..memory.plan import Plan
from ..memory.processes import ProcessMemory
from ..model.params import Parameter, Params
from ..options import Noise
from ..solve.multistart import Search
from ..solve.trust_region import Record
from .named_model import NamedModel
from .statistics import Groups, Totals

FORMAT, VERSION = "result of dask_nlsq", 6
BESIDE = {  # it, by what names them: its larger arrays; the maps of groups, which `groups.result` writes
    "arrays": re.compile(r"arrays-[0-9a-f]{32}\.npz"),
    "maps": re.compile(r"local(-[0-9a-f]{32})?\.zarr"),
}
INLINE = 64  # elements of an array up to which it is written into the JSON, where people can read it
FIT = """popt pcov param_names cost n_points n_masked n_omitted nfev sweeps resumed status message optimality distance plan
    reduction jac_mode history seconds starts sample damage n_filled fixed tied derived spread bounds noise
    totals parts factor model loss f_scale preparation origins groups"""


class Kind(NamedTuple):
    """A kind of record: its class, the names of its fields, and what makes it of these, if not the class."""

    cls: type
    fields: str
    make: Callable | None = None


def _layouts(x, kind, lead) -> Layouts:
    """Of any data with such coordinates."""
    return Layouts(Layout(True), Layout(False), None, x, kind, lead, ndim=1)


RECORDS = {
    "fit": Kind(SimpleNamespace, FIT, dict),
    "read": Kind(Read, "nbytes n_points n_left_out seconds"),
    "step": Kind(
        Record,
        "iteration nfev cost actual predicted step_norm radius optimality accepted params seconds reduction read distance",
    ),
    "search": Kind(Search, "starts start_costs params costs basin chosen winner n_candidates n_points"),
    "sample": Kind(SampleSummary, "n_points n_chunks of_chunks seconds nfev"),
    "process": Kind(
        ProcessMemory,
        "name n_threads now held peak limit dask_nlsq jax numpy python x64 pjrt_nproc cores limited",
    ),
    "plan": Kind(
        Plan,
        "strategy reason n_points n_params n_chunks n_partitions sweep_bytes held_bytes in_flight_bytes places decoded",
    ),
    "damaged chunk": Kind(BadChunkError, "array index key cause masked"),
    "noise": Kind(Noise, "loss absolute reweighted sigma"),
    "groups": Kind(Groups, "locals n_groups of_groups local_distance accuracy largest interchangeable"),
    "totals": Kind(Totals, "cost n weight weighted squares"),
    "parts": Kind(SegmentSums, "gram spread cost residual squares n n_tiles floored weights"),
    "factor": Kind(Factor, "R projected gradient condition"),
    "model": Kind(NamedModel, "name fingerprint n values free names expr"),
    "parameter": Kind(Parameter, "name value error at_bound bounds fixed expr"),
    "params": Kind(Params, "parameters", lambda parameters: Params(*parameters)),
    "coordinate": Kind(Layout, "integer", lambda integer: Layout(True, integer)),
    "coordinates": Kind(Layouts, "x kind=x_kind lead=x_lead", _layouts),
    "preparation": Kind(Preparation, "layouts whole decode_cf=policy.decode_cf", Preparation.of),
}
NAMES = {kind.cls: name for name, kind in RECORDS.items()}


def fields(kind: Kind) -> dict[str, str]:
    """Attributes by the names of fields."""
    return {name: attribute or name for name, _, attribute in (each.partition("=") for each in kind.fields.split())}


def encode(value, place: str, arrays: dict[str, np.ndarray]):
    """JSON of a value; its larger arrays go to ``arrays`` by their places. What JSON cannot distinguish is an object."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        if 0 < value.size <= INLINE and np.isfinite(value).all():
            return {"array": value.tolist(), "dtype": value.dtype.str}
        arrays[place] = value
        return {"stored": place}
    if isinstance(value, dict):
        return {"dict": {name: encode(each, f"{place}.{name}", arrays) for name, each in value.items()}}
    if name := NAMES.get(type(value)):
        values = {each: attrgetter(attribute)(value) for each, attribute in fields(RECORDS[name]).items()}
        return {"record": name, "fields": {each: encode(part, f"{place}.{each}", arrays) for each, part in values.items()}}
    parts = [encode(each, f"{place}[{k}]", arrays) for k, each in enumerate(value)]
    return {"tuple": parts} if isinstance(value, tuple) else parts


def decode(found, place: str, arrays: Mapping[str, np.ndarray]):
    """What `encode` was given."""
    match found:
        case {"float": text}:
            return float(text)
        case {"array": numbers, "dtype": dtype}:
            return np.array(numbers, dtype)
        case {"stored": number}:
            return known(arrays, number, number)
        case {"dict": parts}:
            return {name: decode(each, f"{place}.{name}", arrays) for name, each in parts.items()}
        case {"record": name, "fields": parts}:
            kind = RECORDS[name]
            places = {each: f"{place}.{each}" for each in fields(kind)}
            values = {each: decode(known(parts, each, where), where, arrays) for each, where in places.items()}
            check_types(kind.cls, values)
            return (kind.make or kind.cls)(**values)
        case {"tuple": parts}:
            return tuple(decode(each, f"{place}[{k}]", arrays) for k, each in enumerate(parts))
        case list():
            return [decode(each, f"{place}[{k}]", arrays) for k, each in enumerate(found)]
    return found


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """TypeError where a value is not what the class has declared: what a file says is shown as numbers without a look."""
    for name, hint in get_type_hints(cls).items():
        if name in values and not _is_of(values[name], hint):
            raise TypeError(f"{name} is not of {hint}")


def _is_of(value, hint) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of(value, each) for each in parts)
    if kind is Literal:
        return value in parts
    if kind in (int, float) and is_number(value):
        return kind is float or is_integer(value)
    if kind in (tuple, list) and isinstance(value, kind) and parts:
        each = parts[:1] * len(value) if kind is list or parts[-1] is Ellipsis else parts
        return len(each) == len(value) and all(map(_is_of, value, each))
    if kind is dict and isinstance(value, dict) and parts:
        return all(_is_of(name, parts[0]) and _is_of(each, parts[1]) for name, each in value.items())
    return kind is Any or isinstance(value, kind)


def known(parts: Mapping, name: str, place: str):
    """A part of a saved result; ValueError with its place where it is missing."""
    if name not in parts:
        raise ValueError(f"it has no `{place}`")
    return parts[name]


# ---------------------------------------------------------------------------------------------------------------------
# the files


def save(path: Path, fit: SimpleNamespace, maps: str | None = None) -> None:
    """Write what has the fields of `FIT`, with the name of the maps beside it; what was there is replaced at the end."""
    arrays: dict[str, np.ndarray] = {}
    text = encode(fit, "result", arrays)
    make_directory("path", path, RESULT)
    before = beside(path)["arrays"]
    name = f"arrays-{uuid4().hex}.npz" if arrays else None
    if name:
        write_arrays(path / name, arrays, VERSION)
    write_json(path / RESULT, format=FORMAT, version=VERSION, arrays=name, maps=maps, result=text)
    if before and not (path / before).is_dir():
        (path / before).unlink(missing_ok=True)
    remove_left(path, BESIDE["arrays"], kept=beside(path)["arrays"])


def beside(path: Path) -> dict[str, str | None]:
    """What lies beside the result at ``path``, by `BESIDE`; nothing where there is no result, or none that can be read."""
    try:
        return _beside(read_json(path / RESULT, VERSION))
    except (OSError, ValueError):
        return dict.fromkeys(BESIDE)


def _beside(found: Mapping[str, Any]) -> dict[str, str | None]:
    """Plain names of our pattern; ValueError where it names something else."""
    names = {what: found.get(what, "") for what in BESIDE}
    for what, name in names.items():
        if name is not None and not (isinstance(name, str) and BESIDE[what].fullmatch(name)):
            raise ValueError(f"it names {name!r} as its {what}")
    return names


def _what_else(path: Path) -> str:
    """What is there instead of a result."""
    if not path.exists():
        return "there is nothing at this path"
    return "it is a checkpoint, dask_nlsq.resume(path) continues it" if (path / FIT_FILE).exists() else f"it has no {RESULT}"


def load(path: Path) -> tuple[dict[str, Any], str | None]:
    """The fields of `FIT` and the name of the maps, as `save` has written them.

    Raises
    ------
    ValueError
        Where there is no result, one of another version, one without a field; a `DamagedFileError` for a damaged file.
    """
    try:
        found = read_json(path / RESULT, VERSION)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not a saved result: {_what_else(path)}") from None
    with well_formed(path / RESULT):
        names = _beside(found)
    for name in filter(None, names.values()):
        check_link(path / name)
    try:
        arrays, _ = read_arrays(path / names["arrays"], VERSION) if names["arrays"] else ({}, {})
    except FileNotFoundError:
        raise DamagedFileError(path / str(names["arrays"]), "it is not there") from None
    with well_formed(path / RESULT):
        return decode(found["result"], "result", arrays), names["maps"]
