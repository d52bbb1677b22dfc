"""The Zarr group of a map on disk: made, looked at before anything in it is believed, read.

Chunks have a CRC-32C behind the compressor. The last that is written of a new group is a seal in its attributes: checksums
of these, and of the metadata of each array. A group without it is made again; what is not as it was sealed is damage.
What others add to the group, arrays or attributes, does not matter.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib.util import find_spec
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from ..base.disk import named_when_full
from ..base.files import (
    DamagedFileError,
    check_links,
    check_version,
    checksum,
    content_of,
    remove_left,
    well_formed,
    write_whole,
)
from ..base.lazy import zarr
from ..kernels.lanes import MapStatus

VERSION = 1  # of the attributes
PLAIN = str, int, float, bool, list, tuple, np.generic, np.ndarray  # attributes that are kept
METADATA, OURS, DONE = "zarr.json", "dask_nlsq", "done"
COPIES = "consolidated_metadata"  # of the arrays' metadata, in those of the group
PARTIAL = re.compile(r"zarr\.[0-9a-f]{32}\.partial")  # what Zarr has left of metadata that it could not write


# ---------------------------------------------------------------------------------------------------------------------
# written


def create(path: Path, found: Any, identity: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    """Make the group of a `MapResult`, and seal it; one whose creation was interrupted is replaced.

    ``identity`` is compared when the map goes on, ``call`` makes it easier to make the call again. Nothing is left of a new
    group that cannot be made of what it is to hold.
    """
    existed, begun = path.exists(), is_begun(path)
    try:
        _create(path, found, identity, call)
    except (TypeError, ValueError):
        if not begun:
            shutil.rmtree(path)
            if existed:
                path.mkdir()
        raise


def _create(path: Path, found: Any, identity: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    record, blocks, dims = found.record.dtype, found.problem.blocks, found.map_dims
    chunks = tuple(reduce(gcd, map(int, np.cumsum(sizes)[:-1]), 0) or max(sizes) for sizes in blocks)
    names = (*record.names, *found.labels.get("coords", {}), "param", "quantity", DONE)
    if path.exists():
        for each in path.iterdir():  # never path / name: names come from the data, and may be paths
            if each.name in names and each.is_dir():
                shutil.rmtree(each)
        remove_left(path)
        (path / METADATA).unlink(missing_ok=True)
    about = {"version": VERSION, "fields": list(record.names), "call": dict(call), **identity}
    group = zarr.create_group(path, attributes={**_plain(found.labels.get("attrs", {})), OURS: about})
    for name in record.names:
        base, own = record[name].subdtype or (record[name], ())
        # what a pixel has whose block is not done
        empty = np.nan if base.kind == "f" else int(MapStatus.NOT_FITTED_YET) if name == "status" else 0
        group.create_array(
            name, shape=(*found.problem.shape, *own), chunks=(*chunks, *own), dtype=base, compressors=_codecs(),
            dimension_names=(*dims, *inner(name)), fill_value=empty, attributes=attributes(name),
        )  # fmt: skip
    if find_spec("xarray"):
        named = found.coordinates.assign_attrs(group.attrs)  # which it would else take away
        texts = {name: each.astype(object) for name, each in named.coords.items() if each.dtype.kind == "U"}
        # as objects they become Zarr's type of text, which has no fixed length, and a specification
        encoding = {name: dict(compressors=_codecs()) for name in named.coords}
        named = named.assign_coords(texts)
        named.to_zarr(path, mode="a", consolidated=False, zarr_format=3, encoding=encoding)
    create_done(path, found)


def create_done(path: Path, found: Any) -> None:
    """Make the array that says which blocks are done, none so far, and seal the group with it."""
    numbers = tuple(map(len, found.problem.blocks))
    zarr.open_group(path, mode="r+").create_array(
        DONE, shape=numbers, chunks=(1,) * len(numbers), dtype="u1", fill_value=0, compressors=_codecs(),
        dimension_names=[f"blocks_of_{dim}" for dim in found.map_dims],
    )  # fmt: skip
    with warnings.catch_warnings():  # zarr: not in the specification of format 3; xarray looks for it, and warns without
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(path)
    metadata = _parsed(path / METADATA, path)
    about = metadata["attributes"][OURS]
    about |= dict(attributes=[name for name in metadata["attributes"] if name != OURS])
    about |= dict(sums={each.parent.name: _sum(_parsed(each, path)) for each in sorted(path.glob(f"*/{METADATA}"))})
    beside = about["sums"].keys() - {*about["fields"], DONE}
    about |= dict(chunks={name: _n_chunks(path / name) for name in sorted(beside)})  # those of fill values are not written
    about |= dict(checksum=seal(metadata["attributes"]))
    text = json.dumps(metadata, indent=2).encode()
    write_whole(path / METADATA, [text])


def remove(path: Path) -> None:
    """Remove a map; what is something else, or damaged, stays."""
    try:
        whole = not path.is_symlink() and is_sealed(read_about(path))
    except ValueError:
        whole = False
    if whole:
        shutil.rmtree(path)


def write_block(record, path, index, place) -> np.ndarray:
    """The task: write a block's maps, then that it is done; the status of its pixels."""
    group: Any = zarr.open_group(path, mode="r+")
    with named_when_full(Path(path), record.nbytes):
        for name in record.dtype.names:
            # a chunk of the fill value is written as well, so that one that is absent has been lost
            group[name].with_config({"write_empty_chunks": True})[(*place, ...)] = record[name]
        group[DONE][index] = 1
    return record["status"]


def inner(name) -> tuple[str, ...]:
    """Names of the axes behind those of the map."""
    if name.startswith("derived"):
        return ("quantity",)
    return {"popt": ("param",), "perr": ("param",), "at_bound": ("param",), "pcov": ("param", "param_")}.get(name, ())


def attributes(name) -> dict[str, Any]:
    if name == "status":
        return dict(flag_values=[s.value for s in MapStatus], flag_meanings=" ".join(s.name for s in MapStatus))
    return {"units": "1"} if name in ("nfev", "n_points") else {}


def _plain(attrs):
    """Those that JSON can hold, and NumPy's scalars and arrays as Python's."""
    return {
        str(name): json.loads(json.dumps(value, default=_listed))
        for name, value in attrs.items()
        if isinstance(value, PLAIN)
    }


def _listed(value):
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _codecs():
    codecs = zarr.codecs  # type: ignore[attr-defined]  # as Zarr's annotations have it
    return [codecs.ZstdCodec(level=0), codecs.Crc32cCodec()]


# ---------------------------------------------------------------------------------------------------------------------
# looked at, and read


class NoMapError(ValueError):
    """There is something else than a map."""


def is_begun(path: Path) -> bool:
    """Whether there is something at ``path`` besides what Zarr leaves where it could not even begin."""
    if not path.is_dir():
        return path.exists()
    return any(not PARTIAL.fullmatch(each.name) for each in path.iterdir())


def is_map(path: Path) -> bool:
    """Whether `read_about` takes what is there for a map of ours, damaged or not."""
    try:
        read_about(path)
    except NoMapError:
        return False
    except ValueError:
        return True
    return True


def identity_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What `create` was given, of what `read_about` finds."""
    others = ("version", "fields", "call", "attributes", "sums", "chunks", "checksum")
    return {name: value for name, value in about.items() if name not in others}


def is_sealed(about: Mapping[str, Any]) -> bool:
    return "checksum" in about


def read_about(path: Path) -> dict[str, Any]:
    """What the map that was begun at ``path`` is a result of.

    Raises
    ------
    NoMapError
        Where there is none of ours.
    DamagedFileError
        Where attributes or metadata are not as they were sealed, or a link leads out of the group.
    ValueError
        Where it has another version.
    """
    try:
        metadata = _parsed(path / METADATA, path)
    except (FileNotFoundError, NotADirectoryError):
        metadata = {}
    own = metadata.get("attributes")
    about = own.get(OURS) if isinstance(own, dict) else None
    if not isinstance(about, dict):
        if any(json.dumps(mark) in json.dumps(metadata) for mark in (OURS, "fit_axes")):
            raise DamagedFileError(path / METADATA, "it does not describe a map", path)
        raise NoMapError(f"{path} is not a map that to_zarr has begun: give another path")
    check_links(path)
    if not {"version", "checksum"} & about.keys():
        check_version(path, None, VERSION)  # as of the first formats
    if is_sealed(about) or (path / DONE / "c").exists():
        _check(path, metadata)
    check_version(path, about.get("version"), VERSION)
    kinds = dict(limits=dict, operands=dict, stores=dict, blocks=list, parameters=list, model=str)
    if any(not isinstance(about.get(name), kind) for name, kind in kinds.items()) or not isinstance(
        about.get("call", {}), dict
    ):
        raise DamagedFileError(path / METADATA, "it does not describe a map", path)
    return about


def _check(path: Path, metadata: Mapping[str, Any]) -> None:
    """DamagedFileError where attributes or metadata are not those that were sealed."""
    about, name = metadata["attributes"][OURS], METADATA
    with well_formed(path / METADATA, path):
        if about.get("checksum") != seal(metadata["attributes"]):
            raise ValueError("its checksum does not match")
        if (metadata["zarr_format"], metadata["node_type"], len(metadata.keys() - {COPIES})) != (3, "group", 3):
            raise ValueError("it is not that of a Zarr group")
        copies = metadata.get(COPIES)
        changed = [name for name, known in about["sums"].items() if copies and _sum(copies["metadata"].get(name)) != known]
        if changed:
            raise ValueError(f"its metadata of {changed[0]} are not those that were written")
    for name, known in about["sums"].items():
        file = path / Path(name).name / METADATA
        if name == DONE and not file.parent.exists():
            continue  # which is made again
        if not file.exists() or _sum(_parsed(file, path)) != known:
            raise DamagedFileError(file, "it is not as it was written", file.parent if name == DONE else path)
    for name, n in about.get("chunks", {}).items():
        if _n_chunks(path / Path(name).name) < n:
            raise DamagedFileError(path / Path(name).name, "chunks of it are missing", path)


def _n_chunks(path: Path) -> int:
    return sum(each.is_file() for each in path.rglob("*")) - 1  # the other one is its metadata


def _parsed(path: Path, whole: Path) -> dict[str, Any]:
    content = content_of(path)
    with well_formed(path, path.parent if path.parent.name == DONE else whole):
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("it is not the metadata of Zarr")
    return found


def _sum(values) -> str:
    return checksum(json.dumps(values, sort_keys=True).encode()).hex()


def seal(attributes: Mapping[str, Any]) -> str:
    """Of our attributes, and of those beside them that were there when the group was sealed."""
    about = {name: value for name, value in attributes[OURS].items() if name != "checksum"}
    return _sum([about, *(attributes[name] for name in about["attributes"])])


def lost_blocks(path: Path, about: Mapping[str, Any], done: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
    """Which of the blocks that are ``done`` lack a chunk of one of these arrays, by default of any.

    Zarr reads an absent chunk as fill values, but each chunk of a block that is done has been written.
    """
    group: Any = zarr.open_group(path, mode="r")
    lost = np.zeros(done.shape, bool)
    for name in about["fields"] if names is None else names:
        array, key_of = group[name], group[name].metadata.encode_chunk_key
        numbers = [_numbers(*each) for each in zip(about["blocks"], array.chunks, strict=False)]
        inner = [range(1)] * (array.ndim - done.ndim)  # these axes are not cut
        for index in map(tuple, np.argwhere(done & ~lost).tolist()):
            chunks = product(*(along[k] for along, k in zip(numbers, index, strict=True)), *inner)
            lost[index] = not all(os.path.exists(f"{path}/{name}/{key_of(each)}") for each in chunks)
    return lost


def _numbers(sizes: Sequence[int], chunk: int) -> list[range]:
    """The chunks of each block along an axis."""
    ends = np.cumsum(sizes).tolist()
    return [range((end - n) // chunk, -(-end // chunk)) for n, end in zip(sizes, ends, strict=True)]


def read_done(path: Path) -> np.ndarray:
    """Which blocks are done."""
    with well_formed(path / DONE):
        return np.asarray(zarr.open_array(path / DONE, mode="r")[...], bool)
