"""The processes that take part in a fit: their threads, memory, versions and settings, and what to change in them."""

from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

import dask
from distributed import Client

from ..base.config import threads
from ..base.text import GB, size, table
from ..base.values import positive
from .device import PREALLOCATE, Device
from .machine import NO_X64, available_memory, process_settings, workers_memory
from .needs import WORKER_BYTES
from .threshold import effective_fraction

HERE = "this process"
EVEN = 0.9  # of the largest limit, from which limits count as the same
VERSIONS = ("dask_nlsq", "jax", "numpy", "python")


class ProcessMemory(NamedTuple):
    """A process that takes part in a fit; sizes in bytes, ``limit`` inf where it is not known."""

    name: str
    n_threads: int
    now: float
    held: float
    peak: float
    limit: float  # of all that the process takes, not of the fit alone
    dask_nlsq: str
    jax: str
    numpy: str
    python: str
    x64: str
    pjrt_nproc: str | None
    cores: int
    limited: bool = True  # whether ``limit`` was set, or is what the machine has
    device: Device = Device()
    on_device: float = 0.0  # of what is held, if it fits there


class Room(NamedTuple):
    """What a process may take for a fit or a map, in bytes."""

    name: str
    n_threads: int
    settings: dict
    base: float  # that it has already, or needs to begin with
    nbytes: float  # that it may take beside that
    most_held: float  # of it, of data
    limit: float  # of all that it takes
    source: str  # of what it may take, in words
    limited: bool  # by the user
    ceiling: float  # of all that it takes, which no ``memory_limit_gb`` can raise

    def limited_to(self, gib: float) -> "Room":
        """The same with ``memory_limit_gb=gib``."""
        return self._replace(nbytes=min(self.settings["now"] + gib * GB, self.ceiling) - self.base)

    def place(self, held: float, taken: float, n_threads: int | None = None, on_device: float = 0.0) -> ProcessMemory:
        """The process that holds and takes this many bytes; ``on_device`` are those of blocks that could be there."""
        peak, n_threads = self.base + taken, self.n_threads if n_threads is None else n_threads
        there = on_device if self.device.kind.own_memory else 0.0
        sizes: Any = dict(held=held, peak=peak, limit=self.limit, on_device=there)
        return ProcessMemory(self.name, n_threads, **sizes, **self.settings)

    @property
    def device(self) -> Device:
        return self.settings["device"]


def room_here(limit_gb: float | None) -> Room:
    """What this process may take: ``limit_gb`` GiB, or the share that `effective_fraction` allows of what is available."""
    settings, fraction = process_settings(), effective_fraction()[0]
    nbytes, source = available_memory() * fraction, f"{fraction:.0%} of what is available"
    if limit_gb is not None:
        nbytes, source = positive("memory_limit_gb", limit_gb, "GiB") * GB, "memory_limit_gb"
    now = settings["now"]
    return Room(HERE, threads(), settings, now, nbytes, inf, now + nbytes, source, limit_gb is not None, inf)


def rooms_of_workers(client: Client, limit_gb: float | None) -> list[Room]:
    """What each worker may take: up to the share of its memory where Dask writes to disk, of ``limit_gb`` GiB at most."""
    n_threads, found = ask_workers(client)
    dasks = dask.config.get("distributed.worker.memory")  # shares of process and of data, above which it writes to disk
    share, data_share = min(effective_fraction()[0], dasks["spill"] or 1.0), dasks["target"] or 1.0
    source = "memory_limit_gb, and " * (limit_gb is not None) + f"{share:.0%} of its memory"
    most = inf if limit_gb is None else positive("memory_limit_gb", limit_gb, "GiB")
    limits = dict.fromkeys(found, inf) | (workers_memory(client) or {})
    rooms = []
    for address, settings in found.items():
        limit, now = limits[address], settings["now"]
        base, ceiling, limited = max(WORKER_BYTES, now), share * limit, limit_gb is not None
        sizes = base, ceiling - base, data_share * limit, limit
        room = Room(address, n_threads[address], settings, *sizes, source, limited, ceiling)
        rooms.append(room.limited_to(most) if limited else room)
    return rooms


class Report:
    """What `cluster_report` found: its text is the table. ``places`` are this process and the workers.

    ``page`` is where the live page of fits is, if there is one.
    """

    def __init__(self, places: tuple[ProcessMemory, ...], page: str | None = None):
        self.places, self.page = places, page

    @property
    def advice(self) -> list[str]:
        """What to change, a line each, with the command."""
        return advice(self.places)

    def __repr__(self):
        names = ("process", "threads", "now", "limit", *VERSIONS, "x64", "PJRT_NPROC", "device")
        rows = [
            (
                *(p.name, str(p.n_threads), size(p.now), size(p.limit)),
                *(getattr(p, each) for each in VERSIONS),
                *(p.x64, pjrt(p), has(p)),
            )
            for p in self.places
        ]
        page = [f"live page: {self.page}"] if self.page else []
        return "\n".join([*table([names, *rows]), *(f"to do: {each}" for each in self.advice), *page])


def processes_of(client: Client | None) -> tuple[ProcessMemory, ...]:
    """This process and the workers of ``client``."""
    places = [ProcessMemory(HERE, 1, held=0, peak=0, limit=inf, **process_settings())]
    if client is not None:
        n_threads, found = ask_workers(client)
        limits = workers_memory(client) or {}
        places += [ProcessMemory(a, n_threads[a], held=0, peak=0, limit=limits.get(a, inf), **found[a]) for a in found]
    return tuple(places)


def wanted_resources() -> dict[str, float]:
    """What ``dask.annotate(resources=...)`` around a fit asks of the workers, such as ``{"GPU": 1}``."""
    return dask.get_annotations().get("resources") or {}


def ask_workers(client: Client) -> tuple[dict[str, int], dict[str, dict]]:
    """By address: threads, and `machine.process_settings`, of the workers that may have tasks of a fit: of all of them,
    or of those that have the resources of an annotation around the call, without which Dask gives them none.
    """
    workers, wanted = client.scheduler_info(n_workers=-1)["workers"], wanted_resources().items()
    workers = {a: each for a, each in workers.items() if all(each["resources"].get(key, 0) >= n for key, n in wanted)}
    answers = client.run(process_settings, workers=list(workers), on_error="return") if workers else {}
    found = {address: answer for address, answer in answers.items() if not isinstance(answer, OSError)}  # others have left
    for address, answer in found.items():
        if isinstance(answer, ModuleNotFoundError):
            raise ModuleNotFoundError(
                f"worker {address} cannot import {answer.name}: `pip install dask_nlsq` where it runs, or "
                'client.register_plugin(distributed.PipInstall(["dask_nlsq"]))',
                name=answer.name,
            ) from answer
        if isinstance(answer, Exception):
            raise answer
        answer["limited"] = bool(workers[address]["memory_limit"])
    return {address: workers[address]["nthreads"] for address in found}, found


def advice(places: Iterable[ProcessMemory]) -> list[str]:
    """What to change in the settings of the workers, a line for all workers that it holds for; the first place is ours."""
    ours, *workers = places
    names: dict[str, list[str]] = {}
    most = max((place.limit for place in workers if place.limited), default=0)
    for place in workers:
        for what in _mismatches(ours, place, most):
            names.setdefault(what, []).append(place.name)
    for what, who in _shared_cards(workers):
        names.setdefault(what, []).extend(who)
    more = {what: f" and {len(who) - 1} more" if len(who) > 1 else "" for what, who in names.items()}
    return [f"{who[0]}{more[what]}: {what}" for what, who in names.items()]


def _mismatches(ours: ProcessMemory, place: ProcessMemory, most: float):
    for package in VERSIONS[:-1]:
        theirs, version = getattr(place, package), getattr(ours, package)
        if theirs != version:
            yield f"{package} {theirs}, here {version}: `pip install {package}=={version}` there, and restart the worker"
    if place.python.split(".")[:2] != ours.python.split(".")[:2]:
        yield f"Python {place.python}, here {ours.python}: start the worker with the Python of the client, or vice versa"
    n, of_jax = place.n_threads, int(said) if (said := place.pjrt_nproc or "").isdigit() else place.cores
    if n > 1 and of_jax != n and not place.device.kind.own_memory:
        why = f"JAX runs {of_jax} kernels at once" if of_jax < n else f"each of them may start {of_jax} more"
        yield f"it has {n} threads, and {why}: set PJRT_NPROC={n} in its environment before it starts"
    if place.x64 == NO_X64:
        yield "its device does not support float64: set JAX_PLATFORMS=cpu in its environment before it starts"
    if not place.limited:
        yield "no memory limit, so Dask never spills to disk: `dask worker --memory-limit 8GB`"
    elif place.limit < EVEN * most:
        yield (
            f"memory limit {size(place.limit)}, others {size(most)}: all threads get equal amounts of data, so the "
            f"smallest limit counts: `dask worker --memory-limit`, or fewer `--nthreads`"
        )


def _shared_cards(workers: Iterable[ProcessMemory]) -> Iterable[tuple[str, list[str]]]:
    """Workers that compute on the same devices, the first of which takes most of the memory."""
    cards: dict[str, list[ProcessMemory]] = {}
    for each in workers:
        cards.setdefault(each.device.card, []).append(each)
    for card, those in cards.items():
        if card and len(those) > 1 and any(each.device.preallocated for each in those):
            yield (
                f"{len(those)} workers compute on the same {those[0].device}, whose memory JAX takes for the first of them: "
                f"start one worker for each device, with CUDA_VISIBLE_DEVICES, or set {PREALLOCATE}=false before they start",
                [each.name for each in those],
            )
    kinds = {each.device.platform: each for each in workers}
    if len(kinds) > 1:
        yield (
            f"workers compute on devices of different kinds, {' and '.join(kinds)}, so data are cut for CPUs, which is slow "
            "on others: choose workers by dask.annotate(resources=...)",
            [each.name for each in kinds.values()],
        )


def has(place: ProcessMemory) -> str:
    """The device in words, with its memory."""
    return f"{place.device}, {size(place.device.total)}" if place.device.total else str(place.device)


def pjrt(place: ProcessMemory) -> str:
    return place.pjrt_nproc or f"- ({place.cores} cores)"
