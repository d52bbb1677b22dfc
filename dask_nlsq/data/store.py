"""Arrays in Zarr stores: how they are opened, looked at before the first sweep, and read with errors that say where.

What Zarr does not report: an absent chunk, an empty shard, and a directory instead of a chunk are read as fill
values; an error of a codec names neither array nor chunk; a stalled object store is waited for without end. So all keys
are looked at once before anything is read, each read has a deadline, and what may pass (a lost connection) is tried
again, but never what a codec says.
"""

from __future__ import annotations

import asyncio
import json
import logging
import lzma
import os
import stat
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import product
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import numpy as np

from ..base.config import codec_pipeline
from ..base.files import ZARR_METADATA, well_formed
from ..base.lazy import da, zarr
from ..base.text import near
from ..base.values import is_address
from ..base.warn import warn
from .cf import AS_STORED, Decoding
from .joining import Item, coarser, split
from .patience import client_errors, is_absent, patience, said

TOGETHER = 64  # small chunks that one request is for
KEYS_AT_ONCE = 64  # of which the sizes are asked for
NAMED = 3  # chunks in a message
SAMPLED, ENDS = 16, 2**15  # chunks that distinguish a copy from other data, and bytes at both of their ends
HDF5 = b"\x89HDF\r\n\x1a\n"  # how such files begin
DECODING: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    EOFError,
    TypeError,
    AssertionError,
    zlib.error,
    lzma.LZMAError,
)
NOT_UNDERSTOOD = (ValueError, TypeError, LookupError, AttributeError)  # raised by Zarr where it opens damaged metadata
CHECKSUMS = ("crc32", "fletcher32", "adler32", "lookup3", "gzip", "zlib", "checksum=true")  # in what codecs call themselves

logger = logging.getLogger("dask_nlsq")
_warned: set[str] = set()


class Policy(NamedTuple):
    """What to do with unreadable and absent chunks."""

    on_bad_chunk: Literal["raise", "mask"] = "raise"
    missing_chunks: Literal["error", "mask", "fill"] = "error"

    @property
    def masks(self) -> bool:
        return "mask" in self


class BadChunkError(RuntimeError):
    """A chunk of a stored array that cannot be read.

    Attributes
    ----------
    array : str
        Argument and place of the array.
    index : tuple of int
        Of the chunk in the grid of chunks (of shards, where the array has them).
    key : str
        Of the chunk in the store.
    cause : str
        What went wrong.
    masked : bool
        Whether its points are to be left out.
    """

    def __init__(self, array: str, index: tuple[int, ...], key: str, cause: str, masked: bool = False):
        super().__init__(array, index, key, cause, masked)
        self.array, self.index, self.key, self.cause, self.masked = array, index, key, cause, masked

    def __eq__(self, other):
        return isinstance(other, BadChunkError) and self.args == other.args

    def __hash__(self):
        return hash(self.args)

    def __str__(self):
        return (
            f"chunk {self.index} of {self.array} cannot be read: {self.cause} (key {self.key}). Restore the chunk, or leave "
            'its points out with on_bad_chunk="mask" (missing_chunks="mask" where it is absent)'
        )


# ---------------------------------------------------------------------------------------------------------------------
# opening


def is_stored(data) -> bool:
    """Whether `open_array` opens it: a Zarr array, a path or URL, or a list of these."""
    if isinstance(data, list):
        return bool(data) and all(isinstance(each, (str, PurePath, zarr.Array)) for each in data)
    return isinstance(data, (str, PurePath, zarr.Array))


def _hint(name: str, source) -> str:
    """What a text that is not a path may mean."""
    if name == "sigma" and (found := near(str(source), ["poisson"])):
        return found
    if is_address(str(source)) and not isinstance(source, PurePath):
        return ""  # a store elsewhere is not asked for more
    group, member = Path(source).parent, Path(source).name
    if member and any((group / file).is_file() for file in ZARR_METADATA):
        with suppress(*NOT_UNDERSTOOD, OSError):
            known = sorted(zarr.open_group(group, mode="r", use_consolidated=False).array_keys())
            return f"; the arrays of {str(group)!r} are: {', '.join(known) or 'none'}{near(member, known, '; ')}"
    of_labels = name.startswith("xdata") and not {"/", "."} & {*str(source)}
    return "; names of coordinates need an xarray `ydata`" if of_labels else ""


def open_array(name: str, source) -> zarr.Array:
    """The array at a path or URL: of an array, or of a member of a group, in a directory, a zip file or an object store.

    Raises
    ------
    FileNotFoundError
        Where nothing is there.
    TypeError
        Where it is a group, or a file of another format.
    DamagedFileError, ValueError
        Where its metadata are not JSON, or not those of an array that Zarr can read.
    OSError
        Where the store does not answer, or not to us.
    """
    if isinstance(source, zarr.Array):
        return source
    store, path = _store(name, source)
    pipeline = codec_pipeline()
    try:
        with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
            # consolidated metadata go stale when an array grows
            opened = zarr.core.sync.sync(
                patience().get(lambda: zarr.api.asynchronous.open(store=store, path=path, mode="r", use_consolidated=False))
            )
        if not isinstance(opened.attrs, dict):
            raise TypeError(f"its attributes are {opened.attrs!r}, which is not a JSON object")
    except (FileNotFoundError, zarr.errors.NodeNotFoundError, zarr.errors.GroupNotFoundError) as err:
        raise FileNotFoundError(f"`{name}`: no Zarr array at {str(source)!r}{_hint(name, source)}") from err
    except client_errors(TimeoutError) as err:
        raise OSError(f"`{name}`: the store of {str(source)!r} cannot be read: {said(err)}") from err
    except NOT_UNDERSTOOD as err:
        zarr.core.sync.sync(patience().get(lambda: _check_metadata(source, store, path)))
        raise ValueError(f"`{name}`: Zarr cannot open the array at {str(source)!r}: {said(err)}") from err
    if not isinstance(opened, zarr.AsyncArray):
        members = ", ".join(sorted(zarr.Group(opened).array_keys())) or "none"
        raise TypeError(f"`{name}`: {str(source)!r} is a group: name one of its arrays as in '{source}/ARRAY' ({members})")
    return zarr.Array(opened)


async def _check_metadata(source, store, path) -> None:
    """DamagedFileError where a file of metadata is not JSON."""
    if isinstance(store, str):
        storage = zarr.storage
        store = storage.FsspecStore.from_url(store, read_only=True) if is_address(store) else storage.LocalStore(store)
    place = await zarr.storage.StorePath.open(store, path or "", mode="r")
    for file in ZARR_METADATA:
        content = await (place / file).get()
        if content is None:
            continue
        with well_formed(f"{str(source).rstrip('/')}/{file}", ""):
            if not isinstance(json.loads(content.to_bytes()), dict):
                raise ValueError("it is not a JSON object")


def _store(name, source):
    """A store, or what Zarr makes one of, and the path in it."""
    text = str(source)
    if is_address(text) and not isinstance(source, PurePath) and not os.path.exists(text):
        return text, None
    file = next((parent for parent in (Path(text), *Path(text).parents) if parent.is_file()), None)
    if file is None:
        return text, None
    if file.suffix == ".zip":  # Zarr takes a .zip for a directory
        return zarr.storage.ZipStore(file, mode="r"), Path(text).relative_to(file).as_posix().removeprefix(".") or None
    with open(file, "rb") as opened:
        is_hdf5 = opened.read(len(HDF5)) == HDF5
    way_out = (
        "an HDF5 file: open it with h5py and pass one of its datasets, as h5py.File(path)['entry/data']"
        if is_hdf5
        else "a file that is not a Zarr store: open it with a library for its format, and pass the array"
    )
    raise TypeError(f"`{name}`: {str(file)!r} is {way_out}")


def address(array) -> str:
    """Of a Zarr array; of files the whole path, wherever the process runs."""
    kind, sep, path = str(array.store_path).partition("://")
    return f"{kind}{sep}{os.path.abspath(path)}" if kind in ("file", "zip") else f"{kind}{sep}{path}"


def n_stored(data) -> int:
    """Values of what `open_array` opens, by metadata alone."""
    return sum(open_array("ydata", each).size for each in (data if isinstance(data, list) else [data]))


class Opened(NamedTuple):
    """Stored arrays as a Dask array, and what is known of them."""

    array: da.Array
    stored: list[Stored]
    decoding: Decoding  # what is still to be done with the values
    decodings: list[Decoding]  # of each of the arrays, done or not


def as_dask(name: str, data, policy: Policy, decode_cf: bool = True, masks: bool = False) -> Opened:
    """A Dask array of what is stored, whole shards or chunks at a time, and the arrays behind it.

    Chunks that may be masked are joined where they are small.

    Several arrays are concatenated along their first axis. Values are decoded, and masked where they are invalid; but those
    of ydata, which kernels decode, so that they are held as they are stored. With ``masks`` chunks that are to be left out
    are masked as well, instead of an error.

    Raises
    ------
    ValueError
        Arrays whose shapes do not fit together.
    """
    sources = data if isinstance(data, list) else [data]
    stored = [
        Stored(name if len(sources) == 1 else f"{name}[{k}]", open_array(name, each), policy)
        for k, each in enumerate(sources)
    ]
    shapes = {each.shape[1:] for each in stored}
    if len(shapes) > 1 or (len(stored) > 1 and not stored[0].shape):
        raise ValueError(
            f"`{name}`: arrays are joined along their first axis, and the others differ: {[each.shape for each in stored]}"
        )
    found = [decode_cf and Decoding.of_array(each.name, each.array) for each in stored]
    decodings = [each or AS_STORED for each in found]
    by_kernels = name == "ydata" and len(set(map(repr, decodings))) == 1
    arrays = []
    for each, decoding in zip(stored, decodings, strict=True):
        empty = np.empty((0,) * each.ndim, each.dtype)
        source, meta = (Masking(each), np.ma.masked_array(empty)) if masks else (each, empty)
        array = da.from_array(source, chunks=each.chunks or -1, name=False, asarray=False, meta=meta)
        array = coarser(array) if masks else array
        arrays.append(array if by_kernels or decoding is AS_STORED else decoding.lazily(array))
    array = arrays[0] if len(arrays) == 1 else da.concatenate(arrays)
    return Opened(array, stored, decodings[0] if by_kernels else AS_STORED, decodings)


def open_all(
    policy: Policy, decode_cf: bool = True, masks: bool = False, **arguments
) -> tuple[dict[str, Any], list[Opened]]:
    """The arguments with Dask arrays instead of stored ones, in a tuple of coordinates as well.

    The keys of all chunks are looked at; ``decode_cf`` and ``masks`` as in `as_dask`.
    """
    found, opened = {}, []

    def door(name, data):
        if isinstance(data, tuple) and name == "xdata":
            return tuple(door(f"{name}[{k}]", each) for k, each in enumerate(data))
        if not is_stored(data):
            return data
        opened.append(as_dask(name, data, policy, decode_cf, masks and policy.masks))
        return opened[-1].array

    for name, data in arguments.items():
        found[name] = door(name, data)
    every = [stored for each in opened for stored in each.stored]
    _say_unchecked(every)
    for stored in every:
        scan_keys(stored)
    return found, opened


def _say_unchecked(opened):
    """One line, once in a process, for the arrays of a fit in which bits that have flipped are not found."""
    places = [each.place for each in opened if each.place not in _warned and not has_checksum(each.array)]
    _warned.update(places)
    if places:
        logger.warning(
            "%s: flipped bits are not detected, because there is no checksum. Write with zarr.codecs.Crc32cCodec() after "
            "the compressor, or with ZstdCodec(checksum=True)",
            ", ".join(places),
        )


# ---------------------------------------------------------------------------------------------------------------------
# reading


class Stored:
    """A Zarr array that is read in whole shards or chunks, or boxes of them, with a deadline and errors that say where.

    ``damaged`` holds what is known to be wrong with chunks before they are read: {index: error}.
    """

    def __init__(self, name: str, array: zarr.Array, policy: Policy):
        self.name, self.array, self.policy = name, array, policy
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.chunks = array.shards or array.chunks
        self.patience = patience()
        self.damaged: dict[tuple[int, ...], BadChunkError] = {}
        self.absent: set[tuple[int, ...]] = set()  # known to be, and read as fill values
        self.stamp = 0
        self.times: tuple[int, int] | None = None  # of the first and the last change of a chunk, where it is a directory
        self.sample: dict[tuple[int, ...], int] = {}  # sizes of some chunks there
        self.sizes = 0  # sum of all

    @property
    def place(self) -> str:
        return f"`{self.name}` ({self.url})"

    @property
    def url(self) -> str:
        """Of the array; of files the whole path, wherever the process runs."""
        return address(self.array)

    def describe(self) -> dict[str, Any]:
        """What distinguishes it from other stores, as far as this is cheap: see `same_store`."""
        array = self.array
        layout = dict(shape=self.shape, dtype=str(self.dtype), chunks=self.chunks)
        layout |= dict(codecs=repr([*array.filters, *array.compressors]))
        return layout | dict(place=self.url, stamp=self.stamp, times=self.times, content=self._content())

    def _content(self) -> int | None:
        """Of the sizes of all chunks and the ends of some of them; None where the store is not a directory."""
        found = self.sizes
        for index, size in self.sample.items():
            with open(Path(self.array.store.root) / self.key(index), "rb") as file:  # type: ignore[attr-defined]
                for start in (0, max(0, size - ENDS)):
                    file.seek(start)
                    found = zlib.crc32(file.read(ENDS), found)
        return None if self.times is None else found

    def grid(self):
        """Indices of all chunks."""
        return product(*(range(-(-n // c)) for n, c in zip(self.shape, self.chunks, strict=True)))

    def key(self, index: tuple[int, ...]) -> str:
        path = self.array.store_path.path
        return "/".join(part for part in (path, self.array.metadata.encode_chunk_key(index)) if part)

    def error(self, index, cause, masked) -> BadChunkError:
        return BadChunkError(self.place, tuple(index), self.key(index), cause, masked)

    @cached_property
    def ends(self) -> list[np.ndarray]:
        """Where chunks end along each axis."""
        return [np.minimum(np.arange(size, n + size, size), n) for n, size in zip(self.shape, self.chunks, strict=True)]

    def __getitem__(self, item) -> np.ndarray:
        """A chunk or a part of one; or a box of several, whose errors do not say which of them is to blame."""
        plain = all(isinstance(one, slice) and one.step in (None, 1) for one in item)
        chunks = [*split(item, self.ends)] if plain else [(self._first(item), (), item)]
        for index, *_ in chunks:
            if index in self.damaged:
                raise self.damaged[index]
        if len(chunks) > 1:
            return zarr.core.sync.sync(self._read_box(item))
        try:
            return zarr.core.sync.sync(self.patience.get(lambda: self._read(chunks[0][0], item)))
        except client_errors(*DECODING, OSError) as err:
            raise self.error(chunks[0][0], said(err), self.policy.on_bad_chunk == "mask") from err

    def _first(self, item) -> tuple[int, ...]:
        return tuple(getattr(one, "start", one) // size for one, size in zip(item, self.chunks, strict=True))

    async def _read(self, index, item):
        values = np.asarray(await self.array.async_array.getitem(item))
        if index in self.absent or not _is_full_of(self.array.fill_value, values):
            return values
        return await self._again(index, item)

    async def _again(self, index, item):
        """A chunk that was read as fill values, and is to be there."""
        if await _size(self.array.store, self.key(index)) is None:
            raise FileNotFoundError("it existed when the fit began, and no longer does")
        return np.asarray(await self.array.async_array.getitem(item))  # that answer may have been the only one of its kind

    async def _read_box(self, box: Item) -> np.ndarray:
        """Several chunks, few of them by one request, which is waited for as for one."""
        values = np.empty([one.stop - one.start for one in box], self.dtype)
        for _, there, few in self._requests(box):
            found = np.asarray(await self.patience.get(partial(self.array.async_array.getitem, few)))
            filled = [
                (inside, self.patience.get(partial(self._again, index, part)))
                for index, inside, part in split(few, self.ends)
                if index not in self.absent and _is_full_of(self.array.fill_value, found[inside])
            ]
            for (inside, _), each in zip(filled, await asyncio.gather(*(read for _, read in filled)), strict=True):
                found[inside] = each
            values[there] = found
        return values

    def _requests(self, box: Item):
        """Boxes of at most `TOGETHER` chunks."""
        ends, room = [], TOGETHER
        for one, those in zip(reversed(box), reversed(self.ends), strict=True):
            first, last = np.searchsorted(those, [one.start, one.stop - 1], side="right").tolist()
            n = max(1, min(last - first + 1, room))
            ends.append(those[first + n - 1 :: n])
            room //= n
        return split(box, ends[::-1])


class Masking:
    """A `Stored` that masks the chunks which are to be left out, where nothing else keeps count of them."""

    def __init__(self, stored: Stored):
        self.stored, self.shape, self.dtype, self.ndim = stored, stored.shape, stored.dtype, stored.ndim

    def __getitem__(self, item) -> np.ma.MaskedArray:
        try:
            return np.ma.masked_array(self.stored[item])
        except BadChunkError as err:
            if not err.masked:
                raise
            if sum(1 for _ in split(item, self.stored.ends)) > 1:
                raise  # each chunk is read by itself then
            logger.warning("left out: chunk %s of %s, %s (key %s)", err.index, err.array, err.cause, err.key)
            shape = np.broadcast_to(False, self.shape)[item].shape
            return np.ma.masked_array(np.zeros(shape, self.dtype), True)


def _is_full_of(fill_value, values):
    fill = np.asarray(0 if fill_value is None else fill_value, values.dtype)
    parts = (values.ravel()[:1], values)  # the first one decides nearly always
    return all(np.array_equal(part, np.broadcast_to(fill, part.shape), equal_nan=True) for part in parts)


# ---------------------------------------------------------------------------------------------------------------------
# looking before reading


def scan_keys(stored: Stored) -> None:
    """Find chunks that are absent, of no bytes, or not files, from their keys; no chunk is read.

    Raises
    ------
    BadChunkError
        Where chunks are damaged, or absent, and the policy does not leave them out or fill them in.
    """
    sizes = _sizes(stored)
    policy, missing = stored.policy, []
    stored.stamp = _stamp(sizes)
    if files := {index: size for index, size in sizes.items() if isinstance(size, tuple) and len(size) == 2}:
        times = [time for _, time in files.values()]
        stored.times = min(times), max(times)
        stored.sizes = _stamp({index: nbytes for index, (nbytes, _) in files.items()})
        stored.sample = {index: files[index][0] for index in [*files][:: -(-len(files) // SAMPLED)]}
    for index in stored.grid():
        size = sizes.get(index)
        if size is None:
            missing.append(index)
        elif isinstance(size, str) or size[0] == 0:
            cause = size if isinstance(size, str) else "it is empty"
            stored.damaged[index] = stored.error(index, cause, policy.on_bad_chunk == "mask")
    if stored.damaged and policy.on_bad_chunk == "raise":
        raise next(iter(stored.damaged.values()))
    if missing and policy.missing_chunks == "error":
        raise missing_error(
            stored,
            missing,
            'Complete the store; or leave their points out with missing_chunks="mask"; or, if absent chunks mean fill '
            'values, give missing_chunks="fill"',
        )
    if missing and policy.missing_chunks == "mask":
        stored.damaged |= {index: stored.error(index, "it is absent", True) for index in missing}
    else:
        stored.absent = set(missing)


def warn_if_changed(stored: Stored) -> None:
    """Warn where a chunk is not the one, by size and time if the store has them, that it was before the fit."""
    try:
        if _stamp(_sizes(stored)) == stored.stamp:
            return
        text = (
            f"{stored.place} changed during the fit, so its sweeps did not all see the same data: fit a copy, "
            "or fit again when it is complete"
        )
    except BadChunkError as err:
        text = f"{stored.place} does not answer now, so it is unknown whether it changed during the fit: {err.cause}"
    warn(text, RuntimeWarning)


def same_store(then, now) -> bool:
    """Whether two of `Stored.describe`, as JSON keeps them, are of the same bytes.

    A copy has other times, another place, or both. Its content agrees, and all of its chunks are younger than those of
    the original, unless they have kept their times: where only some are, the store was written to.
    """
    if not (isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys() >= {"content", "times"}):
        return False
    if then["content"] is None or any(then[name] != now[name] for name in then.keys() - {"place", "stamp", "times"}):
        return False
    return then["stamp"] == now["stamp"] or now["times"][0] > then["times"][1]


def _stamp(sizes):
    return zlib.crc32(repr(sorted(sizes.items())).encode())


class MissingChunksError(FileNotFoundError):
    """Chunks of a stored array are absent."""


def missing_error(stored: Stored, missing: Sequence[tuple[int, ...]], way_out: str) -> MissingChunksError:
    n_all = sum(1 for _ in stored.grid())
    names = ", ".join(f"{index} (key {stored.key(index)})" for index in missing[:NAMED])
    return MissingChunksError(
        f"{len(missing)} of {n_all} chunks of {stored.place} are absent, first {names}: Zarr would read them as fill "
        f"value {stored.array.fill_value}. {way_out}"
    )


def _sizes(stored: Stored) -> dict[tuple[int, ...], Any]:
    """Per chunk that is there (bytes, time of the last change as far as is known), or what it is instead of a file."""
    store = stored.array.store
    if isinstance(store, zarr.storage.LocalStore):
        return dict(_local_sizes(stored, Path(store.root)))
    base = zarr.abc.store.Store  # type: ignore[attr-defined]  # Zarr imports it, its annotations do not say so
    if type(store).getsize is base.getsize:  # it would read the whole value
        keys = zarr.core.sync.sync(stored.patience.get(lambda: _listed(store, stored.array.store_path.path)))
        return {index: (-1,) for index in stored.grid() if stored.key(index) in keys}
    return zarr.core.sync.sync(_asked(stored, store))


def _local_sizes(stored, root):
    for index in stored.grid():
        try:
            found = os.stat(root / stored.key(index))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as err:
            yield index, said(err)
            continue
        is_file = stat.S_ISREG(found.st_mode)
        yield index, (found.st_size, found.st_mtime_ns) if is_file else "it is not a file"


async def _listed(store, path):
    return {key async for key in store.list_prefix(f"{path}/" if path else "")}


async def _size(store, key):
    """(bytes,) of what is there, None where nothing is."""
    try:
        return (await store.getsize(key),)
    except FileNotFoundError as err:
        if is_absent(err):
            return None
        raise err.__cause__ or err from None


async def _asked(stored, store):
    turn = asyncio.Semaphore(KEYS_AT_ONCE)

    async def one(index):
        async with turn:
            try:
                return await stored.patience.get(lambda: _size(store, stored.key(index)))
            except client_errors(OSError) as err:
                if stored.policy.on_bad_chunk == "raise":
                    raise stored.error(index, said(err), False) from err
                return said(err)

    tasks = {index: asyncio.create_task(one(index)) for index in stored.grid()}
    try:
        sizes = await asyncio.gather(*tasks.values())
    finally:  # the first error ends the others
        for task in tasks.values():
            task.cancel()
    return {index: size for index, size in zip(tasks, sizes, strict=True) if size is not None}


def has_checksum(array: zarr.Array) -> bool:
    """Whether a flipped bit in a chunk is found: a checksum of its own, or of gzip, zstd (where asked for)."""
    text = repr([*array.filters, *array.compressors]).lower().replace(" ", "")
    return any(name in text for name in CHECKSUMS)
