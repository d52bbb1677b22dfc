"""A map fitted to Zarr in a process of its own, to be killed: ``python -m tests.mapped DATA OUT LOG [resume]``.

Each read of a chunk of DATA is a line in LOG, and takes a while.
"""

import asyncio
import sys

import dask
import zarr
from zarr.storage import LocalStore

import dask_nlsq
from tests.spectra import P0, X, peak


class Logging(LocalStore):
    log = None

    async def get(self, key, prototype, byte_range=None):
        if key.startswith("c/"):
            with open(self.log, "a") as file:
                file.write(key + "\n")
            await asyncio.sleep(0.1)
        return await super().get(key, prototype, byte_range)


def main(data, out, log, again=""):
    Logging.log = log
    y = zarr.open_array(Logging(data, read_only=True), mode="r")
    with dask.config.set(num_workers=2):
        dask_nlsq.fit_map(peak, X, y, P0).to_zarr(out, resume=bool(again))


if __name__ == "__main__":
    main(*sys.argv[1:])
