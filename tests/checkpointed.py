"""A fit in a process of its own, to be killed: ``python -m tests.checkpointed DATA CHECKPOINT OUT [resume]``."""

import json
import sys

import dask
import jax.numpy as jnp
import numpy as np

import dask_nlsq


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


P0 = [260.0, 0.35, 40.0]


def main(data, checkpoint, out, again=""):
    x = np.linspace(0, 10, 60_000)
    with dask.config.set({"nlsq.checkpoint-seconds": 0.0, "nlsq.threads": 2}):
        print("begin", flush=True)
        if again:
            result = dask_nlsq.resume(checkpoint)
        else:
            result = dask_nlsq.curve_fit(decay, x, data, P0, checkpoint=checkpoint)
    found = dict(status=result.status, sweeps=result.sweeps, cost=result.cost, nfev=result.nfev, message=result.message)
    found |= dict(popt=result.popt.tolist(), pcov=result.pcov.tolist(), history=[record.cost for record in result.history])
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    from tests.checkpointed import main  # so that the model has a module to be imported from

    main(*sys.argv[1:])
