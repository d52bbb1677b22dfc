"""A map of peaks that the tests of maps share, so that one compilation serves most of them; and stores that count."""

import threading
from collections import Counter
from functools import cache

import dask.array as da
import jax.numpy as jnp
import numpy as np
import zarr
from zarr.storage import LocalStore

from dask_nlsq import fit_map
from dask_nlsq.memory.machine import process_settings
from dask_nlsq.memory.needs import JOINING

N = 40
X = np.linspace(-5, 5, N)
BLOCK = (5, 6)  # pixels: the shape of a block is compiled in
P0 = [4.0, 0.3, 1.0, 0.5]
NAMES = ("area", "center", "width", "offset")
FIELDS = ("popt", "perr", "chi2", "n_points", "nfev", "status", "at_bound")


def peak(x, area, center, width, offset):
    return area * jnp.exp(-0.5 * ((x - center) / width) ** 2) + offset


@cache
def spectra(shape=BLOCK, seed=0):
    """(*map, n) values and their true parameters, (*map, p)."""
    rng = np.random.default_rng(seed)
    low, high = np.array([3, -1, 0.6, 0.2]), np.array([6, 1, 1.6, 1.5])
    truth = low + (high - low) * rng.random((*shape, 4))
    area, center, width, offset = (truth[..., k, None] for k in range(4))
    y = area * np.exp(-0.5 * ((X - center) / width) ** 2) + offset + rng.normal(0, 0.15, (*shape, N))
    y.flags.writeable = truth.flags.writeable = False
    return y, truth


def blocks_of(y):
    """A Dask array in blocks of the shared shape."""
    return da.from_array(y, chunks=(*BLOCK, -1))


def fitted(y, **options):
    """The computed map of an array (*map, n)."""
    return fit_map(peak, X, y, P0, **options).compute()


def same_bits(found, expected, where=...):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name)[where], getattr(expected, name)[where], err_msg=name)


class Counting(LocalStore):
    """A directory that counts reads of chunks."""

    reads: Counter
    _lock = threading.Lock()

    async def get(self, key, prototype, byte_range=None):
        if "c/" in key:
            with self._lock:
                self.reads[key] += 1
        return await super().get(key, prototype, byte_range)


def counted(path, y, chunks):
    """``y`` in a store that counts, and its counter."""
    zarr.create_array(path, shape=y.shape, chunks=chunks, dtype=y.dtype)[...] = y
    store = Counting(path, read_only=True)
    store.reads = Counter()
    return zarr.open_array(store, mode="r"), store.reads


def limit_of_two_bands(monkeypatch, y):
    """GiB in which chunks of ``y`` (n, *map) along its first axis are joined in two bands; what this process has is not
    counted, so that plans can be compared.
    """
    settings = process_settings() | dict(now=0)
    monkeypatch.setattr("dask_nlsq.memory.processes.process_settings", lambda: settings)
    whole = fit_map(peak, X, y, P0, axis=0).plan
    return (whole.peak_bytes - 0.4 * JOINING * whole.read_bytes) / 2**30
