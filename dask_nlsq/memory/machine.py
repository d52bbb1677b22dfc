"""What memory there is, in bytes: of the machine, of the container around this process, of the workers of a cluster."""

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Literal, NamedTuple

import psutil
from distributed import Client, default_client

from .device import device_here

NO_LIMIT = 2**60  # bytes; cgroup v1 writes "none" as the largest multiple of a page below 2^63
# mallopt's names, and values at which a kernel reuses its scratch memory while chunks are still given back at once
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 2**26
M_MMAP_THRESHOLD, MAPPED_FROM = -3, 2**22
MOST_MAPPED = 2**25  # to which glibc itself raises the second, and the first to twice of it, when such arrays are freed
NO_X64 = "no"  # what Apple's GPUs can do
Method = Literal["psutil", "sysconf", "cgroup-v1", "cgroup-v2", "workers", "fallback"]


class Detected(NamedTuple):
    """Bytes in all, or None where nothing says so, and who said it."""

    total: float | None
    method: Method


class Cgroup(NamedTuple):
    """The tightest limits on the memory of this process's control group and of the groups around it."""

    limit: int  # bytes
    headroom: int  # bytes to the nearest limit; file cache that the kernel can give up counts as free
    version: Literal[1, 2]


class _Files(NamedTuple):
    limit: str
    usage: str
    cache: str  # line of memory.stat
    version: Literal[1, 2]


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", 1)
_V2 = _Files("memory.max", "memory.current", "inactive_file", 2)


def cgroup_memory(root: Path | str = "/") -> Cgroup | None:
    """Limits of the control groups of this process, None if there are none.

    Parameters
    ----------
    root : path
        Directory that holds ``proc/self/cgroup`` and ``sys/fs/cgroup``.

    Notes
    -----
    A limit holds for all groups below it, so every ancestor is read; in a container the path in ``/proc`` may be the
    host's, of which only the top is mounted.
    """
    mount = Path(root, "sys/fs/cgroup")
    found = []
    for line in (_read(Path(root, "proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files, top = _V2, mount
        elif "memory" in controllers.split(","):
            files, top = _V1, mount / "memory"
        else:
            continue
        below = Path(*(part for part in Path(path).parts if part not in ("/", "..")))
        found += [level for group in (below, *below.parents) if (level := _level(top / group, files))]
    if not found:
        return None
    tightest = min(found)
    return tightest._replace(headroom=max(0, min(level.headroom for level in found)))


def _level(group: Path, files: _Files) -> Cgroup | None:
    limit = _read(group / files.limit)
    if limit is None or not limit.isdecimal() or int(limit) >= NO_LIMIT:  # absent, or "max"
        return None
    usage = int(_read(group / files.usage) or 0)
    stat = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines())
    return Cgroup(int(limit), int(limit) - max(0, usage - int(stat.get(files.cache, 0))), files.version)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # not there, or not for this user
        return None


def _physical(psutil_field: str, sysconf_pages: str) -> Detected:
    try:
        return Detected(float(getattr(psutil.virtual_memory(), psutil_field)), "psutil")
    except (OSError, psutil.Error):  # no /proc, as in some sandboxes
        pass
    try:
        return Detected(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf(sysconf_pages)), "sysconf")
    except (AttributeError, OSError, ValueError):  # Windows; a name that this system does not know
        return Detected(None, "fallback")


def detect_memory(root: Path | str = "/") -> Detected:
    """Memory that this process can ever have: the machine's, or its container's where that is less."""
    physical, cgroup = _physical("total", "SC_PHYS_PAGES"), cgroup_memory(root)
    if cgroup is not None and (physical.total is None or cgroup.limit < physical.total):
        return Detected(float(cgroup.limit), "cgroup-v1" if cgroup.version == 1 else "cgroup-v2")
    return physical


def detect_total_system_memory() -> float | None:
    """Bytes of memory that this process can have at most; None if this cannot be determined.

    Physical memory by psutil, else by ``os.sysconf``; a smaller limit of a control group (v1 or v2) wins.
    """
    return detect_memory().total


def available_memory(root: Path | str = "/") -> float:
    """Bytes that this process can still take: what the machine has available, and its container leaves.

    Raises
    ------
    MemoryError
        Neither psutil, ``os.sysconf`` nor a control group has it.
    """
    physical, cgroup = _physical("available", "SC_AVPHYS_PAGES"), cgroup_memory(root)
    known = [] if physical.total is None else [physical.total]
    if cgroup is not None:
        known.append(float(cgroup.headroom))
    if not known:
        raise MemoryError(
            "the available memory cannot be determined here: give memory_limit_gb, or limit_bytes to a MemoryManager"
        )
    return min(known)


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)  # which reads when it began: a twentieth of a small fit


def process_memory() -> tuple[int, int]:
    """Bytes of this process in physical memory: now, and at its peak where the system keeps that."""
    info = _process(os.getpid()).memory_info()
    peak = getattr(info, "peak_wset", info.rss)  # Windows
    for line in (_read(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            peak = int(line.split()[1]) * 1024
    return info.rss, max(info.rss, peak)


def version_of(package: str) -> str:
    """Of a package that is installed, without importing it, or of this one, which may only be on the path."""
    ours = __name__.partition(".")[0]
    return sys.modules[ours].__version__ if package == ours else version(package)


@cache
def _versions() -> dict[str, str]:
    return {each: version_of(each) for each in ("dask_nlsq", "jax", "numpy")} | {"python": python_version()}


def process_settings() -> dict:
    """What this process has now, and what it has set that a fit depends on."""
    x64 = "always" if os.environ.get("JAX_ENABLE_X64", "0").lower() in ("1", "true", "yes", "on") else "in each task"
    if "metal" in os.environ.get("JAX_PLATFORMS", "").lower():
        x64 = NO_X64
    now, _ = process_memory()
    cores, nproc = os.cpu_count() or 1, os.environ.get("PJRT_NPROC")
    return dict(_versions(), now=now, x64=x64, cores=cores, pjrt_nproc=nproc, device=device_here())


def active_client(client: Client | Literal[False] | None = None) -> Client | None:
    """``client``; where it is None the default client, if there is one; None for False: this process alone."""
    if client is False:
        return None
    if client is None:
        try:
            client = default_client()
        except ValueError:
            return None
    if not isinstance(client, Client):
        raise TypeError(f"`client` must be a distributed.Client, None or False (this process alone), not {client!r}")
    if client.asynchronous:
        raise TypeError(
            f"{client!r} is asynchronous and this is its event loop, which a fit would block: run it in a thread, as in "
            "`await asyncio.to_thread(curve_fit, f, x, y)`"
        )
    return client


def workers_memory(client: Client) -> dict[str, float] | None:
    """Bytes that each worker (by address) may hold, None if there are no workers yet, or if a worker does not know.

    A worker without a limit is asked what its machine has, of which it gets the share of one of the workers there.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"]  # releases of 2025 list five by default
    limits = {address: worker["memory_limit"] for address, worker in workers.items()}
    unlimited = [address for address, limit in limits.items() if not limit]
    if unlimited:
        neighbours = Counter(worker["host"] for worker in workers.values())
        totals = client.run(detect_total_system_memory, workers=unlimited, on_error="ignore")  # those that leave
        if None in totals.values():
            return None
        limits = {address: limit for address, limit in limits.items() if limit}
        limits |= {address: total / neighbours[workers[address]["host"]] for address, total in totals.items()}
    return {address: float(limit) for address, limit in limits.items()} or None


@cache
def keep_freed_memory() -> bool:
    """Let glibc reuse what a kernel frees, on a Dask worker; true where that was necessary.

    A nanny sets ``MALLOC_TRIM_THRESHOLD_`` to 64 KiB. Each temporary array of a kernel then comes fresh from the operating
    system, a page fault for every 4 KiB, and a sweep takes 2 to 4 times as long (3 parameters: 1.7 ms instead of 0.5 ms
    for 2^16 points). Afterwards up to 64 MiB per thread stay with the process.
    """
    threshold = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    return threshold.isdigit() and int(threshold) < KEPT_BYTES and _mapped_from(MAPPED_FROM)


@contextmanager
def large_arrays_given_back(nbytes: int) -> Iterator[None]:
    """Within, arrays of 4 MiB and more go back to the system as soon as they are freed, where glibc decides that by itself.

    It keeps those up to 32 MiB otherwise, for each of the threads that read: reading 4e6 values at a time took 1450 MB in
    place of 810. Page faults for fresh ones are a fifth of the time in which 1e7 counts at a time are read and swept. Of
    work that reads little, ``nbytes`` in all, it cannot keep much.
    """
    by_default = nbytes > KEPT_BYTES and not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    changed = by_default and _mapped_from(MAPPED_FROM)
    try:
        yield
    finally:
        if changed:
            _mapped_from(MOST_MAPPED)


def give_freed_memory_back() -> None:
    """What malloc has kept goes back to the system: a millisecond, and 16 after 1e9 points were streamed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _mapped_from(nbytes: int) -> bool:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return all([libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES), libc.mallopt(M_MMAP_THRESHOLD, nbytes)])
