"""Fits on several devices of this process, each with memory of its own: ``python -m tests.virtual_devices`` prints JSON.

XLA makes three devices of the host; data are cut for them as for a GPU, but shorter, so that there is more than one block.
"""

import json
import logging
import threading
import time

import dask
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np

from dask_nlsq import curve_fit, fit_groups, fit_map, hold
from dask_nlsq.engine import devices, partition, request
from dask_nlsq.kernels import kind
from dask_nlsq.memory.pool import ALIGNMENT

SHORT = kind.GPU._replace(name="cpu", block_points=2**14, longest_tile=2**14, tile_bytes=2**19, most_lanes=256)
CALLS = {
    "plain": {},
    "qr": dict(reduction="qr"),
    "robust": dict(loss="soft_l1", f_scale=0.1),
    "masked": dict(mask=np.arange(100_000) % 7 == 0),
    "streamed": dict(strategy="streaming"),
    "chunked": dict(strategy="chunked"),
}


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def peak(x, height, centre, width, base):
    return height * jnp.exp(-((x - centre) ** 2) / (2 * width**2)) + base


def data():
    rng, x = np.random.default_rng(0), np.linspace(0, 4, 100_000, dtype=np.float32)
    return x, (2.5 * np.exp(-1.3 * x) + 0.5 + rng.normal(0, 0.2, x.size)).astype(np.float32)


def spectra():
    rng, x = np.random.default_rng(1), np.arange(64.0)
    heights = rng.uniform(2, 4, (300, 1))
    return x, heights * np.exp(-((x - 30) ** 2) / 50) + 1 + rng.normal(0, 0.05, (300, 64))


def called(name):
    x, y = data()
    if name in ("streamed", "chunked"):
        x, y = (da.from_array(each, 30_000) for each in (x, y))
    return curve_fit(decay, x, y, p0=[1, 1, 0], **CALLS[name])


def fits():
    found = {name: called(name) for name in CALLS}
    out = {name: dict(popt=each.popt.tolist(), perr=each.perr.tolist()) for name, each in found.items()}
    x, y = spectra()
    pixels = fit_map(peak, x, y, p0=[1, 28, 4, 0], axis=-1)
    groups = fit_groups(peak, x, y, p0=[1, 28, 4, 0], local=["height"], group_axes=0)
    out["map"] = dict(popt=np.asarray(pixels.popt).tolist(), perr=np.asarray(pixels.perr).tolist())
    out["groups"] = dict(popt=groups.shared.popt.tolist(), perr=groups.shared.perr.tolist())
    return out


def where(blocks):
    return [next(iter(block.buffers[0].devices())).id for block in blocks]


def held():
    """Of data that are held: where blocks are, in which dtype, how often and when they get there; transfers of a fit.

    ``fetches`` are the devices that each sweep over all blocks, and each over a sample, has fetched from.
    """
    fetches, puts, arrived, fetched, put = [], [], devices._packed, request.fetched, jax.device_put

    def counted(results):
        fetches.append([])
        return fetched(results)

    def counted_fetch(arrays):
        fetches[-1].append(next(iter(arrays[0].devices())).id)
        return arrived(arrays)

    def counted_put(array, *args):
        puts.append(array.nbytes)
        return put(array, *args)

    x, y = data()
    with hold(x, y) as kept:
        place = kept._sweep.place
        before = place.partition.on_devices.blocks
        curve_fit(decay, kept, p0=[1, 1, 0])
        blocks = place.partition.on_devices.blocks
        devices._packed, request.fetched, jax.device_put = counted_fetch, counted, counted_put
        try:
            second = curve_fit(decay, kept, p0=[2, 2, 0], jac_mode="columns")
        finally:
            devices._packed, request.fetched, jax.device_put = arrived, fetched, put
        same = place.partition.on_devices.blocks is blocks
        dtypes = sorted({str(buffer.dtype) for block in blocks for buffer in block.buffers})
    return dict(
        before=before, where=where(blocks), dtypes=dtypes, same=same, fetches=fetches, sweeps=second.sweeps,
        puts=puts, after=place.partition.on_devices,
    )  # fmt: skip


def crowded():
    """Where there is room for a part of the blocks."""
    room, said, handler = devices._room, [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("dask_nlsq").addHandler(handler)
    devices._room = lambda device: 1e5 + devices.scratch(SHORT, 3, SHORT.block_points)
    try:
        found = called("plain")
    finally:
        devices._room = room
    return dict(popt=found.popt.tolist(), said=[each for each in said if "cross" in each])


def sent_ahead():
    """Of a fit that reads its data in each sweep: where the operands of kernels are, and how many run at a time."""
    kinds, running, most, condense = set(), 0, 0, partition.condense_blocks
    lock = threading.Lock()

    def seen(preparation, blocks, requests):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if len(blocks[0].buffers[0]) == SHORT.block_points + ALIGNMENT:  # not of the sample
                kinds.update(type(each).__name__ for block in blocks for each in block.buffers)
        time.sleep(0.005)
        found = condense(preparation, blocks, requests)
        with lock:
            running -= 1
        return found

    partition.condense_blocks = seen
    try:
        with dask.config.set(num_workers=8):
            found = called("streamed")
    finally:
        partition.condense_blocks = condense
    return dict(kinds=sorted(kinds), most=most, popt=found.popt.tolist())


def by_threads():
    adopt, found = kind.inherit_device(), []

    def work():
        adopt()
        found.append(next(iter(jnp.ones(1).devices())).id)

    for _ in range(4):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    return found


def chosen():
    """The caller's device."""
    with jax.default_device(jax.devices()[2]), hold(*data()) as kept:
        found = curve_fit(decay, kept, p0=[1, 1, 0])
        return dict(where=where(kept._sweep.place.partition.on_devices.blocks), popt=found.popt.tolist())


def main():
    expected = fits()
    kind.KINDS["cpu"] = SHORT
    print(
        json.dumps(
            dict(
                n=len(jax.devices()), expected=expected, found=fits(), again=fits(), held=held(), crowded=crowded(),
                by_threads=by_threads(), chosen=chosen(), ahead=sent_ahead(),
            )
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
